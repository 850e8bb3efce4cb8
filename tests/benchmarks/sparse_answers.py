"""Time and memory of a pass over few tokens: ``python -m tests.benchmarks.sparse_answers``.

Forward and backward pass of a divergence, from the student's hidden states and head to the gradients
of both, against a teacher that tells everything (hidden states and a head of its own), k tokens and a
tail, or drawn tokens. Times are the shortest of several rounds, each in turn, in one process; peaks of
memory beyond the inputs are each measured in a process of their own; the student's logits of a chunk
and the gradient of its head are the least that any of them needs, and are printed beside.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_kd.divergences import make_divergence
from lightning_kd.fused import (
    CHUNK_BYTES,
    ChunkedPass,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    TeacherAnswer,
    sampled_of,
    top_k_of,
    weighted_sum,
)


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    tokens: int
    vocabulary: int
    hidden: int
    divergence: str
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class Inputs:
    """Hidden states and heads of both sides."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, shape: Shape) -> "Inputs":
        """Random ones."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(shape.tokens, shape.hidden), (shape.vocabulary, shape.hidden)] * 2
        states, head, others, other = (
            torch.randn(size, generator=generator) / (shape.hidden**0.5 if number % 2 else 1)
            for number, size in enumerate(sizes)
        )
        return cls((states.requires_grad_(), head.requires_grad_()), (others, other))


def answer_of(name: str, inputs: Inputs) -> TeacherAnswer:
    """Return the teacher's answer of a row of the table."""
    full = FullDistribution((LazyHeadLogits((inputs.teacher,)),))
    kind, _, number = name.partition(" ")
    if kind == "k":
        targets = torch.zeros(len(inputs.teacher[0]), dtype=torch.long)
        return top_k_of(full, targets, int(number))
    if kind == "drawn":
        return sampled_of(full, int(number), torch.Generator().manual_seed(0))
    return full


NAMES = ("everything", "k 4", "k 16", "k 64", "k 256", "drawn 16")


def step(name: str, shape: Shape, inputs: Inputs, answer: TeacherAnswer) -> None:
    """Run forward and backward pass; of drawn tokens that of the forward KL."""
    for tensor in inputs.student:
        tensor.grad = None
    divergence = "forward_kl" if name.startswith("drawn") else shape.divergence
    term = DivergenceTerm(make_divergence(divergence))
    head = LazyHeadLogits((inputs.student,))
    chunked_pass = ChunkedPass(head, answer, [term], shape.chunk_bytes)
    total, _ = weighted_sum(chunked_pass, [torch.ones(shape.tokens, dtype=torch.float64)])
    total.backward()


def times(shape: Shape, rounds: int) -> dict[str, float]:
    """Return the shortest time of each."""
    inputs = Inputs.of(shape)
    answers = {name: answer_of(name, inputs) for name in NAMES}
    best = dict.fromkeys(NAMES, float("inf"))
    for _ in range(rounds + 1):  # the first one warms up
        for name in NAMES:
            start = time.perf_counter()
            step(name, shape, inputs, answers[name])
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak(name: str, shape: Shape) -> float:
    """Return megabytes beyond the inputs at the worst moment, in this process."""
    small = Shape(8, 600, shape.hidden, shape.divergence)
    step(name, small, warm := Inputs.of(small), answer_of(name, warm))
    inputs = Inputs.of(shape)
    answer = answer_of(name, inputs)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes("VmRSS")
    step(name, shape, inputs, answer)
    return (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: peaks are measured on Linux")


def peak_apart(name: str, shape: Shape) -> float:
    """Return the same of a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.sparse_answers", "--peak", name]
    done = subprocess.run(
        [*command, json.dumps(asdict(shape))], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--divergence", default="generalized_jsd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, shape = arguments.peak
        print(peak(name, Shape(**json.loads(shape))))
        return
    shape = Shape(arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.divergence)
    columns: dict[str, Callable[[str], float]] = {
        "seconds": times(shape, arguments.rounds).__getitem__,
        "peak MB": lambda name: peak_apart(name, shape),
    }
    measured = {c: {name: of(name) for name in NAMES} for c, of in columns.items()}
    rows = min(shape.tokens, shape.chunk_bytes // (4 * shape.vocabulary))
    least = 4 * shape.vocabulary * (rows + shape.hidden) / 1024e3
    table = Table("teacher tells", title=f"{shape}, at least {least:.1f} MB")
    for column in columns:
        table.add_column(column)
        table.add_column("of everything")
    for name in NAMES:
        cells = []
        for values in measured.values():
            cells += [f"{values[name]:.3f}", f"{values[name] / values['everything']:.2f}"]
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
