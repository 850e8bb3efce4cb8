"""Tests and measurements of a GPU, in ten minutes: ``make gpu``, or ``python -m tests.benchmarks.gpu``.

First the tests with a device; then the fused divergence beside its bare products and its peers,
generation beside ``generate`` of transformers, and a GKD step beside TRL's, each in a process of its
own with a limit of its own. A table is printed last, and with ``--write docs/benchmarks.md`` put there
with the name of the device. Without a GPU it says so, and nothing fails.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.generation import (
    CachedSampler,
    Engine,
    Prompts,
    SamplingOptions,
    TransformersEngine,
)
from tests.benchmarks.fused_divergence import METHODS, Shape, peak, times

TESTS = ("tests/gpu", "tests/resume/test_kill.py")

MARKS = ("<!-- gpu -->", "<!-- end of gpu -->")
"""Where a page has the table."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: What was measured.
        value: The number, with its unit.
        ratio: Over what it is compared with, and with what.
    """

    what: str
    value: str
    ratio: str = ""


def fused() -> Iterator[Row]:
    """The fused divergence: 8,192 tokens, 2,048 and 4,096 wide, 128,256 tokens, bfloat16."""
    for divergence in ("generalized_jsd", "forward_kl"):
        shape = Shape(8192, 128_256, "bfloat16", 1.0, divergence, 2048, 4096)
        names = [name for name in METHODS if name not in {"dense, narrow", "TRL, dense"}]
        measured = {}
        for name in names:
            try:
                measured |= times([name], shape, rounds=3)
            except (ImportError, RuntimeError) as error:
                yield Row(f"{divergence}: {name}", "failed", str(error).splitlines()[0][:80])
        for name, (seconds, _) in measured.items():
            ratio = f"{seconds / measured['products'][0]:.2f} of products"
            memory = f"{1e3 * seconds:.1f} ms, {peak(name, shape) / 1e3:.1f} GB"
            yield Row(f"{divergence}: {name}", memory, ratio)


def generation() -> Iterator[Row]:
    """Half a billion parameters, bfloat16, prompts of 128 tokens, 512 new tokens, to the last one."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=28,
        num_attention_heads=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for rows in (64, 256):
        ways: dict[str, tuple[Engine, str | None]] = {
            "generate": (TransformersEngine(), None),
            "generate, static cache": (TransformersEngine(), "static"),
            "CachedSampler": (CachedSampler(), None),
        }
        rates = {}
        for name, (engine, cache) in ways.items():
            model.generation_config.cache_implementation = cache
            rates[name] = _tokens_per_second(engine, model, rows)
        for name, rate in rates.items():
            ratio = f"{rate / rates['generate']:.2f} of generate"
            yield Row(f"{rows} rows: {name}", f"{rate:,.0f} tokens/s", ratio)


def _tokens_per_second(engine: Engine, model: LlamaForCausalLM, rows: int) -> float:
    ids = torch.randint(2, 32_000, (rows, 128), device="cuda")
    prompts = Prompts(ids, torch.ones_like(ids), frozenset({1}), 0)
    rates = []
    for new in (16, 512, 512):  # the first warms up
        torch.cuda.synchronize()
        started = time.perf_counter()
        done = engine.generate(
            prompts, SamplingOptions(new), seeds=range(rows), models=[(model, 1.0)]
        )
        torch.cuda.synchronize()
        rates.append(int(done.mask.sum()) / (time.perf_counter() - started))
    return median(rates[1:])


def step() -> Iterator[Row]:
    """A GKD step beside TRL's: the table of ``gkd_step_peer``."""
    command = [sys.executable, "-m", "tests.benchmarks.gkd_step_peer", "--cuda", "--rounds", "1"]
    command += ["--vocabulary", "128256", "--accumulation", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        yield Row("GKD step", "failed", done.stderr.strip().splitlines()[-1][:80])
        return
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃|]", line)][1:-1]
        if len(cells) == 6 and cells[3].replace(".", "").isdigit():
            yield Row(
                f"GKD step: {cells[2]}", f"{cells[3]} s, {cells[5]} MB", f"{cells[4]} of ours"
            )


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], int]] = {
    "fused": (fused, 150),
    "generation": (generation, 150),
    "step": (step, 150),
}
"""What is measured, and the seconds that it may take."""


def apart(name: str, seconds: int) -> list[Row]:
    """The rows of a part, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", name]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, timeout=seconds
        )
        lines, code = done.stdout.splitlines(), done.returncode
    except subprocess.TimeoutExpired as error:
        written = error.stdout or b""
        lines, code = written.decode().splitlines(), -1
    rows = [Row(**json.loads(line)) for line in lines if line.startswith("{")]
    if code != 0:
        rows.append(Row(name, "not to its end", f"exit code {code}" if code > 0 else "too long"))
    return rows


def as_markdown(rows: list[Row], device: str, passed: str) -> str:
    """The table, with the device's name."""
    lines = [f"{device}, torch {torch.__version__}. `tests/gpu`: {passed}.", "", "| | | |"]
    lines += ["| --- | --- | --- |", *(f"| {r.what} | {r.value} | {r.ratio} |" for r in rows)]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the table between the marks of a page.

    Raises:
        ValueError: If it has none.
    """
    start, end = MARKS
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no {start} ... {end} for the table; write both into it")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Run all of it; the exit code is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page that gets the table")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        warnings.simplefilter("ignore")
        for row in PARTS[arguments.part][0]():
            print(json.dumps(vars(row)), flush=True)
        return 0
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was tested and nothing measured.")
        return 0
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *TESTS],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(tests.stdout)
    rows = [row for name, (_, seconds) in PARTS.items() for row in apart(name, seconds)]
    text = as_markdown(rows, torch.cuda.get_device_name(), tests.stdout.strip().splitlines()[-1])
    print(text)
    if arguments.write:
        write(arguments.write, text)
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
