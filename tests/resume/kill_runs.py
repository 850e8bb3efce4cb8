"""Runs that are killed and go on, beside one that is not.

``python -m tests.resume.kill_runs OUT --points 10`` tries every method under every strategy. All
processes are forked from one that has imported everything: a start takes a second instead of ten.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_kd.cli import main as cli
from lightning_kd.data import arithmetic_tokenizer
from tests.toys import tiny_llama

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = ("supervised_kd", "gkd", "minillm")
STRATEGIES = ("one", "ddp", "fsdp2")
STEPS = 12
CHECKPOINT_EVERY = 3
"""No multiple of MiniLLM's windows, so that some checkpoints are from the middle of one."""


class Recorder(Callback):
    """A line for each micro-batch: what was read and written, the loss, the learning rate."""

    def __init__(self, path: str) -> None:
        self.path = Path(f"{path}_{os.environ.get('LOCAL_RANK', '0')}.jsonl")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any):
        tokens = hashlib.blake2b(batch["input_ids"].numpy().tobytes(), digest_size=8)
        line = {
            "position": trainer.train_dataloader.position,
            "rows": batch["row"].tolist(),
            "tokens": tokens.hexdigest(),
            "loss": outputs["loss"].item().hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        parts = [
            p.full_tensor() if hasattr(p, "full_tensor") else p for p in pl_module.parameters()
        ]
        weights = torch.cat([part.detach().flatten() for part in parts])
        digest = hashlib.blake2b(weights.numpy().tobytes(), digest_size=8).hexdigest()
        self.path.with_suffix(".end").write_text(digest)


def arguments(method: str, strategy: str, folder: Path) -> list[str]:
    """What a user types."""
    llama: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.1}
    checkpoint = {"dirpath": str(folder / "checkpoints"), "save_last": True, "save_top_k": 1}
    overlay: dict[str, Any] = {
        "model": {"init_args": {"teacher": {"name_or_path": str(folder.parent / "teacher")}}},
        "data": {"init_args": {"batch_size": 4, "validation_size": 8}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1 if strategy == "one" else 2,
            "strategy": "auto" if strategy == "one" else strategy,
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 8,
            "log_every_n_steps": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": checkpoint | {"every_n_train_steps": CHECKPOINT_EVERY},
                },
                {
                    "class_path": "tests.resume.kill_runs.Recorder",
                    "init_args": {"path": str(folder / "record")},
                },
            ],
        },
    }
    if method == "minillm":
        overlay["model"]["init_args"]["student"] = {"name_or_path": str(folder.parent / "student")}
    else:
        overlay["model"]["init_args"]["student"] = {"config": llama}
    if method == "gkd":
        schedule = {"start": 0.2, "end": 0.9, "steps": STEPS}
        overlay["on_policy"] = {"lmbda": {"class_path": "Linear", "init_args": schedule}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    return [
        *("lightning-kd", "fit", "--config", str(CONFIGS / f"{method}.yaml")),
        *("--config", str(folder / "overlay.yaml"), "--export.dirpath", str(folder / "student")),
        *("--trainer.logger.save_dir", str(folder / "runs")),
    ]


def start(argv: list[str], world: int, prepare: Callable[[], None] | None = None) -> list[Any]:
    """One process for each rank, forked from a server that has imported everything and run nothing.

    Args:
        argv: What a user types.
        world: Processes.
        prepare: Called in each of them first; a function of a module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.kill_runs"])
    processes = [
        context.Process(target=run, args=(argv, rank, world, port, prepare))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def run(
    argv: list[str], rank: int, world: int, port: int, prepare: Callable[[], None] | None
) -> None:
    """The command, as one rank; what it prints goes to a file."""
    os.setpgrp()
    # Shared cores: more threads than one would only wait for each other.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.argv = argv
    log = Path(argv[-1]).parent / f"log_{rank}.txt"
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [logging.StreamHandler(sys.stderr)]
    if world > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    if prepare is not None:
        prepare()
    cli()


def finish(processes: list[Any], log: Path) -> None:
    """Wait for all; a failure shows what was printed."""
    for process in processes:
        process.join(240)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
            raise RuntimeError(f"exit {process.exitcode}:\n{log.read_text()[-3000:]}")


def records(folder: Path, world: int) -> list[dict[str, Any]]:
    """The lines of all ranks."""
    lines = []
    for rank in range(world):
        path = folder / f"record_{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            if line.endswith("}"):  # a line may have been cut short
                lines.append({"rank": rank, **json.loads(line)})
    return lines


def uninterrupted(method: str, strategy: str, root: Path) -> dict[str, Any]:
    """What a run comes to that nobody kills: its lines, and a digest of its weights."""
    world = 1 if strategy == "one" else 2
    folder = root / f"{method}_{strategy}_whole"
    finish(start(arguments(method, strategy, folder), world), folder / "log_0.txt")
    lines = {(line["rank"], line["position"]): line for line in records(folder, world)}
    assert len(lines) == world * STEPS * 2, len(lines)
    return {"lines": lines, "end": (folder / "record_0.end").read_text()}


def killed(
    method: str,
    strategy: str,
    root: Path,
    point: int,
    prepare: Callable[[], None] | None = None,
) -> tuple[Path, int]:
    """Kill a run when it has come to a random place, or by itself, and let it go on to its end."""
    world = 1 if strategy == "one" else 2
    folder = root / f"{method}_{strategy}_{point}"
    argv = arguments(method, strategy, folder)
    draw = random.Random(f"{method} {strategy} {point}")
    lines, fraction = draw.randrange(1, world * STEPS * 2), draw.random()
    processes = start(argv, world, prepare)
    began, beat = time.monotonic(), 0.05
    while len(records(folder, world)) < lines and any(p.is_alive() for p in processes):
        if prepare is not None and not all(p.is_alive() for p in processes):
            break
        time.sleep(0.002)
        beat = (time.monotonic() - began) / (1 + len(records(folder, world)))
    if prepare is None:
        time.sleep(fraction * min(beat, 0.2))
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    argv = [*argv[:-2], *resume, *argv[-2:]]
    finish(start(argv, world), folder / "log_0.txt")
    return folder, len(resume)


def differences(reference: dict[str, Any], folder: Path, world: int) -> list[str]:
    """What in a killed run is not as in the reference, bit for bit."""
    found, seen = [], set()
    for line in records(folder, world):
        key = (line["rank"], line["position"])
        seen.add(key)
        if line != reference["lines"][key]:
            found.append(f"{line} instead of {reference['lines'][key]}")
    missing = reference["lines"].keys() - seen
    if missing:
        found.append(f"missing {sorted(missing)}")
    if (folder / "record_0.end").read_text() != reference["end"]:
        found.append("other weights")
    return found


def models(root: Path) -> None:
    """A teacher and a student of the arithmetic task."""
    for seed, name in ((1, "teacher"), (2, "student")):
        tiny_llama(seed, vocab_size=14, attention_dropout=0.1).save_pretrained(root / name)
        arithmetic_tokenizer().save_pretrained(root / name)


def main() -> None:
    """The whole grid, and a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    models(options.out)
    bad = 0
    for method in options.methods:
        for strategy in options.strategies:
            world = 1 if strategy == "one" else 2
            reference = uninterrupted(method, strategy, options.out)
            for point in range(options.points):
                folder, resumed = killed(method, strategy, options.out, point)
                found = differences(reference, folder, world)
                bad += bool(found)
                state = "resumed" if resumed else "started over"
                print(method, strategy, point, state, found[:2] or "exact", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
