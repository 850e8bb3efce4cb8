"""Tests and measurements of a GPU, in ten minutes: ``make gpu``, or ``python -m tests.benchmarks.gpu``.

First the tests with a device; then the fused divergence beside its bare products and its peers,
generation beside ``generate`` of transformers and its continuous batching, of rows that are all long
and of rows of unequal length, a GKD step beside TRL's, and the largest models that such a step can be
taken with; each in a process of its own with a limit of its own. A table is printed last, and with
``--write docs/benchmarks.md`` put there with the name of the device. Without a GPU it says so, and
nothing fails.
"""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import (
    CachedSampler,
    Completions,
    ContinuousBatchingSampler,
    Engine,
    GenerationOptions,
    Prompts,
    SamplingOptions,
    TransformersContinuousBatching,
)
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.benchmarks.fused_divergence import METHODS, Shape, peak, times
from tests.benchmarks.generation_throughput import ends_by_chance
from tests.support.harness import Letters, trainer

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
            beside = measured.get("products")
            ratio = f"{seconds / beside[0]:.2f} of products" if beside else ""
            memory = f"{1e3 * seconds:.1f} ms, {peak(name, shape) / 1e3:.1f} GB"
            yield Row(f"{divergence}: {name}", memory, ratio)


@dataclass(frozen=True)
class Sizes:
    """What is generated, and by what.

    Attributes:
        device: Where.
        dtype: Type of the weights.
        shape: Width, width inside of the layers, layers and attention heads of a model.
        vocabulary: Its tokens.
        prompt: Tokens of a prompt.
        new: Tokens of a completion.
        rows: Rows that are generated together.
        window: Rows of unequal length.
        slots: Of these, how many are generated at once.
        mean: Tokens of them.
        teacher: Shape of the teacher whose layers, like the student's, are doubled.
        most: Most layers.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    shape: tuple[int, int, int, int] = (1024, 4096, 28, 16)
    vocabulary: int = 32_000
    prompt: int = 128
    new: int = 256
    rows: tuple[int, ...] = (64, 256)
    window: int = 256
    slots: int = 64
    mean: int = 48
    student: tuple[int, int, int, int] = (2048, 8192, 8, 16)
    teacher: tuple[int, int, int, int] = (4096, 12288, 8, 32)
    most: int = 512


ON_A_GPU = Sizes()


def llama(sizes: Sizes, shape: tuple[int, int, int, int]) -> LlamaForCausalLM:
    """A random model without an end."""
    width, inner, layers, heads = shape
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(sizes.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype)).eval()


class Generate(Engine):
    """``generate`` of transformers without log-probabilities.

    Args:
        cache: Implementation of its cache; ``static`` is compiled on a GPU.
    """

    def __init__(self, cache: str | None = None) -> None:
        self.cache = cache

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Sample from the whole distribution."""
        ((model, _),) = models
        output = model.generate(
            input_ids=prompts.ids,
            attention_mask=prompts.mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=sorted(prompts.eos_ids),
            pad_token_id=prompts.pad_id,
            cache_implementation=self.cache,
        )[:, prompts.ids.shape[1] :]
        none = torch.zeros(output.shape, device=output.device)
        return Completions.of_columns(output, none, none, prompts.eos_ids)


def in_parts(engine: Engine, prompts: Prompts, new: int, rows: int, model: PreTrainedModel) -> int:
    """Tokens that an engine generates for so many rows at a time."""
    tokens = 0
    for start in range(0, len(prompts.ids), rows):
        part = prompts.ids[start : start + rows]
        done = engine.generate(
            Prompts(part, torch.ones_like(part), prompts.eos_ids, prompts.pad_id),
            SamplingOptions(new),
            seeds=range(start, start + len(part)),
            models=[(model, 1.0)],
        )
        tokens += int(done.mask.sum())
    return tokens


def rates(
    ways: dict[str, tuple[Engine, int]],
    model: PreTrainedModel,
    prompts: Prompts,
    new: int,
    what: str,
) -> Iterator[Row]:
    """Tokens per second of engines, each beside the first one; the first run of each warms up."""
    first = 0.0
    for name, (engine, at_once) in ways.items():
        try:
            in_parts(engine, prompts, min(16, new), at_once, model)
            if isinstance(engine, Generate) and engine.cache == "static":
                in_parts(engine, prompts, new, at_once, model)  # compiles for this length
            _wait()
            started = time.perf_counter()
            tokens = in_parts(engine, prompts, new, at_once, model)
            _wait()
        except (ImportError, RuntimeError, ValueError, MemoryError) as error:
            yield Row(f"{what}: {name}", "failed", str(error).splitlines()[0][:80])
            continue
        rate = tokens / (time.perf_counter() - started)
        first = rate if name == "generate" else first
        ratio = f"{rate / first:.2f} of generate" if first else ""
        yield Row(f"{what}: {name}", f"{rate:,.0f} tokens/s", ratio)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _prompts(sizes: Sizes, rows: int, eos: int) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, sizes.vocabulary, (rows, sizes.prompt), generator=generator)
    return Prompts(ids.to(sizes.device), torch.ones_like(ids).to(sizes.device), frozenset({eos}), 0)


def generation(sizes: Sizes = ON_A_GPU) -> Iterator[Row]:
    """Half a billion parameters, bfloat16, prompts of 128 tokens, 256 new tokens, to the last one."""
    model = llama(sizes, sizes.shape)
    for rows in sizes.rows:
        ways: dict[str, Engine] = {
            "generate": Generate(),
            "CachedSampler, dynamic cache": CachedSampler("dynamic"),
            "CachedSampler, static cache": CachedSampler("static"),
            "ContinuousBatchingSampler": ContinuousBatchingSampler(rows),
            "TransformersContinuousBatching": TransformersContinuousBatching(rows, timeout=60),
        }
        if rows == sizes.rows[0]:  # is compiled, which takes long
            ways["generate, static cache"] = Generate("static")
        each = {name: (engine, rows) for name, engine in ways.items()}
        # An end that comes as rarely as any other token, which some completions do have.
        yield from rates(each, model, _prompts(sizes, rows, 1), sizes.new, f"{rows} rows")


def unequal(sizes: Sizes = ON_A_GPU) -> Iterator[Row]:
    """256 rows that end at any token with the same probability, after 48 in the mean, 64 at a time."""
    model = llama(sizes, sizes.shape)
    ends_by_chance(model, sizes.mean, 7)
    at_once, window = sizes.slots, sizes.window
    ways: dict[str, tuple[Engine, int]] = {
        "generate": (Generate(), at_once),
        "CachedSampler, dynamic cache": (CachedSampler("dynamic"), at_once),
        "CachedSampler, static cache": (CachedSampler("static"), at_once),
        "ContinuousBatchingSampler": (ContinuousBatchingSampler(at_once), window),
        "TransformersContinuousBatching": (
            TransformersContinuousBatching(at_once, timeout=60),
            window,
        ),
        f"CachedSampler, all {window} rows, static cache": (CachedSampler("static"), window),
    }
    what = f"{window} unequal rows, {at_once} at a time"
    yield from rates(ways, model, _prompts(sizes, window, 7), sizes.new, what)


def scale(sizes: Sizes = ON_A_GPU, seconds: float = 60.0) -> Iterator[Row]:
    """The largest student and teacher that take a GKD step, by doubling the layers of both."""
    for placement in ("replicated", "offloaded"):
        started, largest, why = time.monotonic(), "none", ""
        layers = sizes.student[2]
        while layers <= sizes.most:
            began = time.monotonic()
            try:
                largest = _one_step(sizes, layers, placement)
            except (RuntimeError, MemoryError) as error:
                why = f"{layers} layers: {str(error).splitlines()[0][:60]}"
                break
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            layers *= 2
            # Twice as much takes twice as long.
            if 3 * time.monotonic() - 2 * began > started + seconds / 2:
                why = f"no time for {layers} layers"
                break
        yield Row(f"largest models of a GKD step, teacher {placement}", largest, why)


def _one_step(sizes: Sizes, layers: int, placement: str) -> str:
    """Take a step, and return how large the models were and what memory it took."""
    (width, inner, _, heads), (wide, inside, _, many) = sizes.student, sizes.teacher
    teacher = llama(sizes, (wide, inside, layers, many))
    if placement == "offloaded":
        size = sum(p.numel() * p.element_size() for p in teacher.parameters())
        if 2 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError("the teacher would take more than half of the memory of the host")
        teacher.to("cpu")
    student = llama(sizes, (width, inner, layers, heads))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module = GKD(
        student=StudentSpec.of(student), teacher=LocalTeacher.of(teacher, placement=placement)
    )
    options = SamplingOptions(max_new_tokens=min(32, sizes.new))
    is_cuda = sizes.device == "cuda"
    trainer(
        max_steps=1,
        callbacks=[OnPolicyGeneration(generation=options, table_every=0)],
        accelerator="gpu" if is_cuda else "cpu",
        precision="bf16-true" if is_cuda else "32-true",
    ).fit(module, datamodule=Letters(rows=8, batch_size=8))
    own, other = (sum(p.numel() for p in m.parameters()) / 1e9 for m in (student, teacher))
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.0f} GB" if is_cuda else ""
    return f"{own:.2f} and {other:.2f} billion parameters, {layers} layers{memory}"


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
    "fused": (fused, 110),
    "generation": (generation, 150),
    "unequal": (unequal, 70),
    "step": (step, 100),
    "scale": (scale, 80),
}
"""What is measured, and the seconds that it may take; the tests before take some too."""


TESTING = 300
"""Seconds that the tests may take."""


def within(command: Sequence[str], seconds: float) -> tuple[str, int | None]:
    """What a command has written, and its exit code; None if it took longer.

    It is then ended with all that it has started: what is left would keep memory of the GPU.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        written = process.communicate()[0]
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return written, None


def apart(name: str, seconds: float) -> list[Row]:
    """The rows of a part, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", name]
    written, code = within(command, seconds)
    rows = [Row(**json.loads(line)) for line in written.splitlines() if line.startswith("{")]
    if code != 0:
        why = "too long" if code is None else f"exit code {code}"
        rows.append(Row(name, "not to its end", why))
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
        transformers.logging.set_verbosity_error()
        for row in PARTS[arguments.part][0]():
            print(json.dumps(vars(row)), flush=True)
        return 0
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was tested and nothing measured.")
        return 0
    written, code = within([sys.executable, "-m", "pytest", "-q", "-m", "cuda", *TESTS], TESTING)
    print(written)
    passed = (
        f"not to their end in {TESTING} s" if code is None else written.strip().splitlines()[-1]
    )
    rows = [row for name, (_, seconds) in PARTS.items() for row in apart(name, seconds)]
    text = as_markdown(rows, torch.cuda.get_device_name(), passed)
    print(text)
    if arguments.write:
        write(arguments.write, text)
    return 1 if code is None else code


if __name__ == "__main__":
    sys.exit(main())
