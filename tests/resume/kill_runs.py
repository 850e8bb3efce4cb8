"""Runs that are killed several times and go on each time, beside one that nobody kills.

``python -m tests.resume.kill_runs`` tries every method under every strategy in every setting. All
processes are forked from one that has imported everything: a start takes a second instead of ten.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lightning_kd.cli.main import main as cli
from lightning_kd.data import arithmetic_tokenizer
from tests.resume import places
from tests.support.scripts import forked, free_port, rank_variables
from tests.support.toys import tiny_llama

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = ("supervised_kd", "gkd", "minillm")
STRATEGIES = ("one", "ddp", "fsdp2")
ALONE = {"one": "cpu", "cuda": "gpu"}
"""Strategies of one process, and where it is."""
NAMED: dict[str, Any] = dict.fromkeys(ALONE, "auto") | {
    "directory": {
        "class_path": "FSDP2Strategy",
        "init_args": {"save_distributed_checkpoint": True},
    }
}
"""What the trainer is given for a strategy, if not its name; ``directory`` saves shards."""
STEPS = 12
CHECKPOINT_EVERY = 3
"""No multiple of MiniLLM's windows, so that some checkpoints are from the middle of one."""

WALL_CLOCK = re.compile("per_second|time_share")
"""What is never twice the same."""


@dataclass(frozen=True)
class Setting:
    """How a run validates, saves and ends.

    Attributes:
        trainer: Options of the trainer.
        checkpoints: Options of each ``ModelCheckpoint``; ``dirpath`` is a name in the run's folder.
        patience: Validations that ``EarlyStopping`` waits for in vain, none at all if None.
        data: Options of the data.
    """

    trainer: dict[str, Any]
    checkpoints: Sequence[dict[str, Any]]
    patience: int | None = None
    data: dict[str, Any] | None = None

    def callbacks(self, folder: Path) -> list[dict[str, Any]]:
        """As the trainer's configuration lists them."""
        home = "lightning.pytorch.callbacks"
        listed: list[tuple[str, dict[str, Any]]] = []
        for options in self.checkpoints:
            place = {"dirpath": str(folder / options["dirpath"])}
            listed.append((f"{home}.ModelCheckpoint", options | place))
        listed.append(("tests.resume.kill_runs.Recorder", {"path": str(folder / "record")}))
        if self.patience is not None:
            # No loss falls by as much: every validation after the first is in vain.
            stopping = {"monitor": "val/loss", "patience": self.patience, "min_delta": 1000.0}
            listed.append((f"{home}.EarlyStopping", stopping))
        return [{"class_path": path, "init_args": options} for path, options in listed]


_PERIODIC = {"dirpath": "checkpoints", "save_last": True, "save_top_k": 1}
_BEST = {"monitor": "val/loss", "save_top_k": 2}
_EVERY = {"every_n_train_steps": CHECKPOINT_EVERY}
SETTINGS = {
    "plain": Setting({"max_steps": STEPS, "val_check_interval": 8}, [_PERIODIC | _EVERY]),
    "steps": Setting(
        {"max_steps": STEPS, "val_check_interval": 4},
        [_PERIODIC | _EVERY, {"dirpath": "best"} | _BEST],
        patience=3,
    ),
    # Saves follow validations, and no other step.
    "validated": Setting(
        {"max_steps": STEPS, "val_check_interval": 6},
        [{"dirpath": "checkpoints", "save_last": True} | _BEST],
        patience=2,
    ),
    # Passes end inside of micro-batches and of accumulation windows.
    "epochs": Setting(
        {"max_epochs": 5, "check_val_every_n_epoch": 1},
        [{"dirpath": "checkpoints", "save_last": True, "save_top_k": -1}],
        patience=2,
        data={"train_size": 27},
    ),
}
KILLED = ("steps", "validated", "epochs")
"""Settings whose runs are killed; others are for tests that see to that themselves."""


class Recorder(Callback):
    """What happened, in files of each process and in the checkpoints.

    A checkpoint has all that led to it, so the end of a run has what survived the kills: every
    micro-batch, validation and epoch once, in the order of a run that nobody kills.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(f"{path}_{os.environ.get('LOCAL_RANK', '0')}.jsonl")
        self.history: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": [*self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [*state_dict["history"]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write({"start": trainer.global_step})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any):
        tokens = hashlib.blake2b(batch["input_ids"].numpy().tobytes(), digest_size=8)
        line = {
            "position": trainer.train_dataloader.position,
            "rows": batch["row"].tolist(),
            "tokens": tokens.hexdigest(),
            "loss": outputs["loss"].item().hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
        }
        self.write(line)
        self.history.append(line)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics.items()
        values = {n: v.item().hex() for n, v in sorted(metrics) if n.startswith("val/")}
        self.history.append({"validation": trainer.global_step, **values})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.history.append({"epoch": trainer.current_epoch, "steps": trainer.global_step})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        parts = [
            p.full_tensor() if hasattr(p, "full_tensor") else p for p in pl_module.parameters()
        ]
        weights = torch.cat([part.detach().flatten() for part in parts])
        digest = hashlib.blake2b(weights.numpy().tobytes(), digest_size=8).hexdigest()
        end = {"weights": digest, "steps": trainer.global_step, "history": self.history}
        end["decisions"] = [*filter(None, map(decision, trainer.callbacks))]
        self.path.with_suffix(".end").write_text(json.dumps(end))

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def decision(callback: Callback) -> Any:
    """What a callback has decided on, where it is one that decides."""
    if isinstance(callback, EarlyStopping):
        return {"stopped_epoch": callback.stopped_epoch, "in_vain": callback.wait_count}
    if not isinstance(callback, ModelCheckpoint):
        return None
    best = callback.best_model_score
    return {
        "best": weights_of(callback.best_model_path),
        "score": None if best is None else best.item().hex(),
        "kept": sorted(weights_of(path) for path in callback.best_k_models),
    }


def weights_of(path: str) -> str:
    """A checkpoint's step and a digest of its weights: a name may have got a version."""
    if Path(path).is_dir():  # in shards; the last weights of the run are compared anyway
        return f"step {json.loads((Path(path) / 'about.json').read_text())['step']}"
    checkpoint = torch.load(path, weights_only=True)
    parts = [weight.numpy().tobytes() for weight in checkpoint["state_dict"].values()]
    digest = hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
    return f"step {checkpoint['global_step']}: {digest}"


def world_size(strategy: str) -> int:
    """Processes of a strategy."""
    return 1 if strategy in ALONE else 2


def arguments(method: str, strategy: str, folder: Path, setting: str = "plain") -> list[str]:
    """What a user types."""
    llama: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.1}
    chosen = SETTINGS[setting]
    overlay: dict[str, Any] = {
        "model": {"init_args": {"teacher": {"name_or_path": str(folder.parent / "teacher")}}},
        "data": {
            "init_args": {"batch_size": 4, "validation_size": 8} | (chosen.data or {}),
        },
        "trainer": {
            "accelerator": ALONE.get(strategy, "cpu"),
            "devices": world_size(strategy),
            "strategy": NAMED.get(strategy, strategy),
            "accumulate_grad_batches": 2,
            "max_steps": -1,
            "val_check_interval": None,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": chosen.callbacks(folder),
        }
        | chosen.trainer,
    }
    if method in {"minillm", "sdft"}:
        overlay["model"]["init_args"]["student"] = {"name_or_path": str(folder.parent / "student")}
    if method == "sdft":  # whose teacher is its student's average
        del overlay["model"]["init_args"]["teacher"]
    elif method == "minillm":
        overlay["on_policy"] = {"steps_per_window": 2, "passes": 2}
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


def start(
    argv: list[str], world: int, prepare: Callable[[], None] | None = None, rank: int | None = None
) -> list[Any]:
    """One process for each rank, forked from a server that has imported everything and run nothing.

    Args:
        argv: What a user types.
        world: Processes.
        prepare: Called in each of them first, or only in one; a function of a module.
        rank: That one.
    """
    port = free_port()
    return [
        forked(run, argv, own, world, port, prepare if rank in {None, own} else None)
        for own in range(world)
    ]


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
        os.environ |= rank_variables(rank, world, port)
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


def until_killed(processes: list[Any], log: Path, seconds: float = 240) -> bool:
    """Wait for the end of a run; where one process was killed, the others are killed with it.

    Returns:
        Whether the run was killed; otherwise all of it is done.

    Raises:
        RuntimeError: If it failed, or took too long.
    """
    deadline, alive = time.monotonic() + seconds, [*processes]
    while alive and time.monotonic() < deadline:
        wait([process.sentinel for process in alive], deadline - time.monotonic())
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in processes):
            # Not the one that waits in vain for the other.
            time.sleep(0.05)
            break
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if -signal.SIGKILL in codes:
        return True
    if any(codes) or None in codes:
        raise RuntimeError(f"exits {codes}:\n{log.read_text()[-3000:]}")
    return False


def records(folder: Path, world: int) -> list[dict[str, Any]]:
    """The micro-batches of all ranks, and of all that were killed."""
    lines = []
    for rank in range(world):
        path = folder / f"record_{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            if line.endswith("}") and "position" in line:  # a line may have been cut short
                lines.append({"rank": rank, **json.loads(line)})
    return lines


def starts(folder: Path) -> list[int]:
    """After how many steps each start of a run began."""
    lines = map(json.loads, (folder / "record_0.jsonl").read_text().splitlines())
    return [line["start"] for line in lines if "start" in line]


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers that the event files of all starts show; the later file decides.

    Raises:
        ValueError: If one start wrote a number twice.
    """
    shown: dict[tuple[str, int], float] = {}
    for path in sorted((folder / "runs").rglob("events.*"), key=lambda path: path.stat().st_mtime):
        one = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val and not WALL_CLOCK.search(value.tag):
                    # Training and validation of a step both show the epoch.
                    if (value.tag, event.step) in one and value.tag != "epoch":
                        raise ValueError(f"{value.tag} of step {event.step} is twice in {path}")
                    one[value.tag, event.step] = value.tensor.float_val[0]
        shown |= one
    return shown


def exported(folder: Path) -> str:
    """A digest of the student that the run left."""
    data = (folder / "student" / "model.safetensors").read_bytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def uninterrupted(method: str, strategy: str, setting: str, root: Path) -> dict[str, Any]:
    """What a run comes to that nobody kills; a second call reads what the first has left."""
    world, chosen = world_size(strategy), SETTINGS[setting]
    folder = root / f"{method}_{strategy}_{setting}"
    if not folder.exists():
        finish(start(arguments(method, strategy, folder, setting), world), folder / "log_0.txt")
    whole = outcome(folder, world)
    if chosen.patience is None:
        assert len(whole["lines"]) == world * STEPS * 2, len(whole["lines"])
    else:
        seen = [event for event in whole["end"]["history"] if "validation" in event]
        assert len(seen) == 1 + chosen.patience, seen
    return whole


def outcome(folder: Path, world: int) -> dict[str, Any]:
    """Micro-batches, logs, decisions and weights of a run."""
    return {
        "lines": {(line["rank"], line["position"]): line for line in records(folder, world)},
        "end": json.loads((folder / "record_0.end").read_text()),
        "logged": logged(folder),
        "exported": exported(folder),
    }


def differences(reference: dict[str, Any], folder: Path, world: int) -> list[str]:
    """What in a killed run is not as in the reference, bit for bit."""
    found, expected_lines = [], reference["lines"]
    wrong = [
        x for x in records(folder, world) if x != expected_lines.get((x["rank"], x["position"]))
    ]
    if wrong:
        expected = expected_lines.get((wrong[0]["rank"], wrong[0]["position"]))
        found.append(f"{len(wrong)} micro-batches: {first_difference(wrong[0], expected)}")
    own = outcome(folder, world)
    if missing := expected_lines.keys() - own["lines"].keys():
        found.append(f"micro-batches {sorted(missing)} missing")
    for name, expected in reference["end"].items():
        if own["end"][name] != expected:
            found.append(f"{name}: {first_difference(own['end'][name], expected)}")
    if own["logged"] != reference["logged"]:
        found.append(f"logged: {first_difference(own['logged'], reference['logged'])}")
    if own["exported"] != reference["exported"]:
        found.append("another student is exported")
    return found


def first_difference(own: Any, expected: Any) -> str:
    """Where two values differ, in a line."""
    if isinstance(own, dict) and isinstance(expected, dict):
        keys = sorted(k for k in own.keys() | expected.keys() if own.get(k) != expected.get(k))
        return (
            f"{len(keys)} differ, {keys[0]}: {own.get(keys[0])} instead of {expected.get(keys[0])}"
        )
    if isinstance(own, list):
        for index, (one, other) in enumerate(zip_longest(own, expected)):
            if one != other:
                return f"entry {index} is {one} instead of {other}"
    return f"{own} instead of {expected}"


@dataclass(frozen=True)
class Kill:
    """Where a process dies.

    Attributes:
        place: One of ``places.PLACES``.
        count: The process dies when it comes there for the ``count``-th time after its start.
        rank: Which process; the others are killed with it.
        seconds: How long after, for ``places.MOMENT``.
    """

    place: str
    count: int = 1
    rank: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """For the line of a sequence."""
        return f"{self.place} {self.count} (rank {self.rank})"


def drawn(name: str, world: int) -> list[Kill]:
    """One to four kills; the same for the same name."""
    draw = random.Random(name)
    kills = []
    for _ in range(draw.randint(1, 4)):
        place = draw.choice(places.PLACES)
        # Half of them as early as can be: right after a resume.
        count = draw.choice([1, draw.randint(1, places.COMES.get(place, 10))])
        rank = 0 if place in places.OF_THE_FIRST else draw.randrange(world)
        kills.append(Kill(place, count, rank, draw.uniform(0, 0.15)))
    return kills


def killed(
    method: str, strategy: str, setting: str, root: Path, number: int, kills: Sequence[Kill] = ()
) -> list[str]:
    """Kill a run, resume it, kill that, ..., and let it go on to its end.

    Args:
        method: One of ``METHODS``.
        strategy: One of ``STRATEGIES``, or ``cuda``.
        setting: One of ``SETTINGS``.
        root: Where teacher and student are, and the run's folder will be.
        number: Of the sequence.
        kills: Where; random places when not given.

    Returns:
        A line for each kill.

    Raises:
        RuntimeError: If the run fails, or is still killed after the last of the kills.
    """
    name, world = f"{method}_{strategy}_{setting}_{number}", world_size(strategy)
    folder, story = root / name, []
    for kill in [*(kills or drawn(name, world)), None]:
        argv = arguments(method, strategy, folder, setting)
        if (last := newest(folder)) is not None:
            argv[-2:-2] = ["--ckpt_path", str(last)]
        prepare = kill and partial(places.die_at, kill.place, kill.count, kill.seconds, Recorder)
        processes = start(argv, world, prepare, kill and kill.rank)
        if not until_killed(processes, folder / "log_0.txt"):
            return story
        story.append(f"{'resumed' if last else 'started'}, {kill}")
    raise RuntimeError(f"{name} was killed by another: {story}")


def newest(folder: Path) -> Path | None:
    """The checkpoint that a user goes on with."""
    found = (folder / "checkpoints").glob("last*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def models(root: Path) -> None:
    """A teacher and a student of the arithmetic task."""
    for seed, name in ((1, "teacher"), (2, "student")):
        tiny_llama(seed, vocab_size=14, attention_dropout=0.1).save_pretrained(root / name)
        arithmetic_tokenizer().save_pretrained(root / name)


def main() -> None:
    """All sequences, and a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="a new temporary folder if not given")
    parser.add_argument("--sequences", type=int, default=216)
    parser.add_argument("--first", type=int, default=0, help="number of the first sequence")
    parser.add_argument("--workers", type=int, default=2, help="sequences at a time")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--settings", nargs="+", default=KILLED, choices=KILLED)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="kill_runs_"))
    out.mkdir(parents=True, exist_ok=True)
    models(out)
    began = time.monotonic()
    cells = [*product(options.methods, options.strategies, options.settings)]
    with ThreadPoolExecutor(options.workers) as pool:
        references = {cell: pool.submit(uninterrupted, *cell, out) for cell in cells}
        jobs = []
        for number in range(options.first, options.first + options.sequences):
            cell = cells[number % len(cells)]
            jobs.append(pool.submit(judged, cell, number, out, references[cell]))
        kills, bad = 0, 0
        for job in as_completed(jobs):
            story, found = job.result()
            kills, bad = kills + len(story) - 1, bad + bool(found)
            print(*story, *(found or ["exact"]), sep="\n  ", flush=True)
    minutes = (time.monotonic() - began) / 60
    exact = f"{len(jobs) - bad} exact, {bad} not"
    print(f"{len(jobs)} sequences, {kills} kills: {exact}; {minutes:.0f} minutes; {out}")
    sys.exit(bad > 0)


def judged(
    cell: tuple[str, str, str], number: int, out: Path, reference: Future[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """Name and kills of a sequence, and what in it is not as in the reference."""
    name, folder = f"{' '.join(cell)} {number}", out / "_".join([*cell, str(number)])
    try:
        expected = reference.result()
        story = killed(*cell, out, number)
        found = differences(expected, folder, world_size(cell[1]))
    except Exception as error:
        return [name], [f"{type(error).__name__}: {error}"]
    if not found:
        shutil.rmtree(folder)
    return [name, *story], found


if __name__ == "__main__":
    # The module that the command line names: its Recorder is another class than that of __main__.
    from tests.resume import kill_runs

    kill_runs.main()
