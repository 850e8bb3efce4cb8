"""A step of SupervisedKD from each kind of teacher, beside the same teacher in the process.

``python -m tests.benchmarks.teacher_kinds [--rounds N] [--write docs/teachers.md]`` runs the command
line once for each kind and round, in turn, one thread a process. It prints what a step takes over what
it takes with the local teacher of the same round (the median of the rounds), by how much the peak
memory of the process exceeds that of SFT, which has no teacher, and the largest difference of a loss.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.cache import read_manifest
from lightning_kd.comparison.documents import replace_between_marks
from lightning_kd.data import train_tokenizer
from tests.support.servers import serving

VOCABULARY, WIDTH, LAYERS, K, STEPS, ROWS, LENGTH = 4096, 512, 10, 64, 10, 8, 129
STUDENT = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384}
STUDENT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
FSDP2 = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2"]
INT8 = "{quant_method: bitsandbytes, load_in_8bit: true}"
SAMPLED = ["--cache.kind", "sampled", "--cache.draws", str(K)]
TOP_K = ["--cache.kind", "top_k", "--cache.k", str(K)]


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    flags: Sequence[str]
    holds: str
    """Of the teacher's weights W, on each process."""
    exact: str
    size: float | None = 0
    """Bytes a token; None where the cache's manifest says it."""
    base: str = ""
    """What its time is compared with. Defaults to the local teacher."""


@dataclass(frozen=True)
class Run:
    """What a run showed."""

    seconds: float
    """Of a step."""
    memory: float
    """Peak of the process, MB."""
    losses: list[float]


def cached(name: str) -> list[str]:
    """Flags of a cached teacher."""
    return ["--model.teacher", "CachedTeacher", "--model.teacher.dirpath", f"cache_{name}"]


def served(**options: Any) -> list[str]:
    """Flags of a served teacher, whose address is filled in when it is known."""
    flags = ["--model.teacher", "ServedTeacher", "--model.teacher.urls", "[URL]"]
    for name, value in options.items():
        flags += [f"--model.teacher.{name}", str(value)]
    return flags


LOCAL = ["--model.teacher.name_or_path", "teacher"]
TWICE = "two processes, `replicated`"
KINDS = [
    Kind("local, `replicated`, float32", LOCAL, "W", "itself"),
    Kind("local, bfloat16", [*LOCAL, "--model.teacher.dtype", "bfloat16"], "W / 2", "rounded"),
    Kind("local, 8 bits", [*LOCAL, "--model.teacher.quantization", INT8], "W / 4", "rounded"),
    Kind(TWICE, [*LOCAL, *FSDP2], "W", "to round-off", base=TWICE),
    Kind(
        "two processes, `sharded`",
        [*LOCAL, *FSDP2, "--model.teacher.placement", "sharded"],
        "W / 2, and a layer",
        "to round-off",
        base=TWICE,
    ),
    Kind("cached, `hidden`", cached("hidden"), "head", "bit for bit", None),
    Kind(f"cached, `top_k` of {K}", cached("top_k"), "nothing", "lower bound", None),
    Kind(f"cached, `sampled`, {K} draws", cached("sampled"), "nothing", "in expectation", None),
    Kind("served, `hidden`", served(), "head", "bit for bit", 4 * WIDTH),
    Kind(
        f"served, `top_k` of {K}",
        served(payload="top_k", k=K),
        "nothing",
        "lower bound",
        12 * K + 12,
    ),
]


def prepare(folder: Path) -> None:
    """Write texts of made-up words, a tokenizer, a teacher and a configuration."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 8))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(ROWS * (STEPS + 2))]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY)
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            initializer_range=0.1,
        )
    )
    teacher.save_pretrained(folder / "teacher")
    data = {"train": "texts.jsonl", "tokenizer": "teacher", "truncation": "right"}
    trainer = {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1}
    config = {
        "model": {"class_path": "SFT", "init_args": {"student": {"config": STUDENT}}},
        "data": {
            "class_path": "DocumentData",
            "init_args": data | {"batch_size": ROWS, "max_length": LENGTH},
        },
        "trainer": trainer | {"devices": 1, "enable_progress_bar": False},
    }
    (folder / "sft.yaml").write_text(json.dumps(config))
    config["model"]["class_path"] = "SupervisedKD"
    (folder / "kd.yaml").write_text(json.dumps(config))


def command(*arguments: str) -> list[str]:
    """The command line of this library."""
    return [sys.executable, "-m", "lightning_kd", *arguments]


def environment() -> dict[str, str]:
    """One thread for each process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(folder: Path, name: str, flags: Sequence[str]) -> Run:
    """Train, and read the run's log."""
    place = folder / "runs" / name
    config = "kd.yaml" if flags else "sft.yaml"
    line = command("fit", "--config", config, *flags, "--trainer.logger.save_dir", str(place))
    line += ["--export.dirpath", str(place / "student")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, cwd=folder, env=environment(), stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(line)}:\n{(folder / 'log').read_text()[-2000:]}")
    seen = EventAccumulator(str(next(place.glob("version_*"))))
    seen.Reload()
    rates = [event.value for event in seen.Scalars("train/tokens_per_second")][2:]
    tokens = [event.value for event in seen.Scalars("train/tokens")][2:]
    seconds = median(count / rate for count, rate in zip(tokens, rates, strict=True))
    losses = [event.value for event in seen.Scalars("train/loss")]
    return Run(seconds, used.ru_maxrss / 1024, losses)


def caches(folder: Path) -> dict[str, float]:
    """Write the caches, and return the bytes that each takes for a token."""
    sizes = {}
    for name, flags in {"hidden": [], "top_k": TOP_K, "sampled": SAMPLED}.items():
        line = command("cache", "--config", "kd.yaml", *LOCAL, *flags)
        line += ["--cache.dirpath", f"cache_{name}", "--cache.splits", "[train]"]
        subprocess.run(line, cwd=folder, env=environment(), check=True, capture_output=True)
        manifest = read_manifest(folder / f"cache_{name}")
        sizes[name] = sum(shard.size for shard in manifest.shards) / manifest.tokens
    return sizes


def table(runs: dict[str, list[Run]], sizes: dict[str, float]) -> str:
    """The table of all kinds."""
    sft = [run.memory for run in runs["SFT"]]
    lines = [
        "| teacher | holds | peak beside SFT | a step | loss differs by | exact | bytes a token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        mine, base = runs[kind.name], runs[kind.base or KINDS[0].name]
        memory = median(run.memory - of for run, of in zip(mine, sft, strict=True))
        ratio = median(run.seconds / of.seconds for run, of in zip(mine, base, strict=True))
        gap = max(abs(a - b) for a, b in zip(mine[0].losses, base[0].losses, strict=True))
        size = sizes[kind.flags[-1].removeprefix("cache_")] if kind.size is None else kind.size
        took = (
            f"{median(run.seconds for run in mine):.2f} s" if mine is base else f"{ratio:.2f} of it"
        )
        cells = [kind.name, kind.holds, f"{max(memory, 0):.0f} MB", took]
        cells += [f"{gap:.1e}" if gap else "0", kind.exact, f"{size:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything in turn; print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    given = parser.parse_args()
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        sizes = caches(folder)
        with serving(folder / "teacher") as url:
            for turn in range(given.rounds):
                for name, flags in [("SFT", []), *((kind.name, kind.flags) for kind in KINDS)]:
                    there = [flag.replace("[URL]", f"[{url}]") for flag in flags]
                    slug = re.sub(r"\W+", "_", f"{name} {turn}")
                    runs.setdefault(name, []).append(run(folder, slug, there))
                    print(name, runs[name][-1].seconds, runs[name][-1].memory, file=sys.stderr)
    made = table(runs, sizes)
    if given.write is None:
        print(made)
    else:
        replace_between_marks(given.write, "table of teachers", made)


if __name__ == "__main__":
    main()
