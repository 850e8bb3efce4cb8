"""Time and memory of a divergence from two heads: ``python -m tests.benchmarks.fused_divergence``.

Forward and backward pass, from hidden states and weights to the gradients of both, in ways that give
the same loss; ``products`` is nothing but the four matrix products that all of them need, in chunks as
ours. Times are the shortest of several rounds, each method in turn, in one process; peaks of memory
beyond the inputs are each measured in a process of its own. Liger and TRL take part where they are
installed (``pip install lightning-kd[bench]``); without a GPU their kernels run on their fallbacks.

Without options the whole grid is run, which takes hours on two cores; each option narrows it, for
example ``--tokens 2048 --vocabulary 32000 --dtype float32 --scored 1 --divergence generalized_jsd``.
``--divergence every`` measures whatever is registered; the last table has all ratios side by side.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_kd.divergences import Divergence, available_divergences, make_divergence
from lightning_kd.fused import fused_linear_divergence
from lightning_kd.fused.chunked_pass import chunk_size, default_chunk_bytes
from lightning_kd.fused.compile_choice import Compile


@dataclass(frozen=True)
class Shape:
    """One row of the grid."""

    tokens: int
    vocabulary: int
    dtype: str
    scored: float
    divergence: str
    hidden: int
    teacher_hidden: int

    @property
    def beta(self) -> float:
        """The divergence as the peers name it."""
        return 0.5 if self.divergence == "generalized_jsd" else 0.0


@dataclass(frozen=True)
class Inputs:
    """Hidden states, heads and what is scored."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    scored: Tensor

    @classmethod
    def of(cls, shape: Shape) -> "Inputs":
        """Random ones, the student near the teacher where they are equally wide."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        scored = torch.rand(shape.tokens, generator=generator, device=device) < shape.scored
        return cls(
            draw(shape.tokens, shape.hidden).to(dtype).requires_grad_(),
            (draw(shape.vocabulary, shape.hidden) / shape.hidden**0.5).to(dtype).requires_grad_(),
            draw(shape.tokens, shape.teacher_hidden).to(dtype),
            (draw(shape.vocabulary, shape.teacher_hidden) / shape.teacher_hidden**0.5).to(dtype),
            scored,
        )


Method = Callable[[Inputs, Shape], Tensor | None]
"""Computes the loss, and leaves the gradients where autograd does."""


def products(x: Inputs, shape: Shape) -> None:
    """The bare matrix products, on the scored positions."""
    with torch.no_grad():
        student, teacher = x.student[x.scored], x.teacher[x.scored]
        narrow = student.dtype
        of_states, of_weight = torch.empty_like(student), torch.empty_like(x.student_weight)
        allowed = default_chunk_bytes(4 * of_weight.numel())
        size = chunk_size(len(student), 8 * shape.vocabulary, allowed)
        own, other = (
            torch.empty(size, shape.vocabulary, dtype=narrow, device=student.device) for _ in "st"
        )
        for start in range(0, len(student), size):
            h, g = student[start : start + size], teacher[start : start + size]
            z, u = own[: len(h)], other[: len(h)]
            torch.mm(h, x.student_weight.T, out=z)
            torch.mm(g, x.teacher_weight.T, out=u)
            torch.mm(z, x.student_weight, out=of_states[start : start + len(h)])
            if start == 0:
                torch.mm(z.T, h, out=of_weight)
            else:
                of_weight.addmm_(z.T, h)


def ours(x: Inputs, shape: Shape) -> Tensor:
    """The fused evaluation with the closed form."""
    return _fused(x, make_divergence(shape.divergence), "never")


def ours_compiled(x: Inputs, shape: Shape) -> Tensor:
    """The same as compiled code."""
    return _fused(x, make_divergence(shape.divergence), "always")


class Automatic(Divergence):
    """A divergence without its closed form, as a user's own has none."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """That of the other one."""
        return self.divergence.value(student_log_probs, teacher_log_probs)


def ours_automatic(x: Inputs, shape: Shape) -> Tensor:
    """The fused evaluation with automatic differentiation in the chunk."""
    return _fused(x, Automatic(make_divergence(shape.divergence)), "never")


def ours_automatic_compiled(x: Inputs, shape: Shape) -> Tensor:
    """The same as compiled code."""
    return _fused(x, Automatic(make_divergence(shape.divergence)), "always")


def _fused(x: Inputs, divergence: Divergence, mode: Compile) -> Tensor:
    result = fused_linear_divergence(
        x.student,
        x.student_weight,
        x.teacher,
        x.teacher_weight,
        divergence=divergence,
        scored=x.scored,
        compile=mode,
    )
    loss = result.total / x.scored.sum()
    loss.backward()
    return loss


def dense(x: Inputs, shape: Shape) -> Tensor:
    """All logits, widened to float32, and automatic differentiation."""
    return _dense(x, shape, torch.float32)


def dense_narrow(x: Inputs, shape: Shape) -> Tensor:
    """All logits, in the type of the inputs."""
    return _dense(x, shape, x.student.dtype)


def _dense(x: Inputs, shape: Shape, dtype: torch.dtype) -> Tensor:
    student = (x.student @ x.student_weight.T).to(dtype).log_softmax(-1)
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).to(dtype).log_softmax(-1)
    values = make_divergence(shape.divergence).value(student, teacher)
    loss = (values * x.scored).sum() / x.scored.sum()
    loss.backward()
    return loss


def trl_dense(x: Inputs, shape: Shape) -> Tensor:
    """The loss of TRL's GKDTrainer without its kernel."""
    from trl.experimental.gkd import GKDTrainer

    student = (x.student @ x.student_weight.T)[None]
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T)[None]
    labels = torch.where(x.scored, 0, -100)[None]
    loss: Tensor = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=shape.beta)
    loss.backward()
    return loss


def trl(x: Inputs, shape: Shape) -> Tensor:
    """The chunked divergence of TRL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(  # type: ignore[no-untyped-call]
        x.student, x.student_weight, None, x.teacher, x.teacher_weight, None, shape.beta
    )
    loss: Tensor = (values * x.scored).sum() / x.scored.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def liger(x: Inputs, shape: Shape) -> Tensor:
    """Liger's chunked loss, not compiled."""
    return _liger(x, shape, compiled=False)


def liger_compiled(x: Inputs, shape: Shape) -> Tensor:
    """Liger's chunked loss as it comes."""
    return _liger(x, shape, compiled=True)


def _liger(x: Inputs, shape: Shape, *, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=shape.beta, compiled=compiled
    )
    labels = torch.where(x.scored, 0, -100)
    loss: Tensor = loss_of(x.student, x.student_weight, x.teacher, x.teacher_weight, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


METHODS: dict[str, Method] = {
    "products": products,
    "ours": ours,
    "ours, compiled": ours_compiled,
    "ours, automatic": ours_automatic,
    "ours, automatic, compiled": ours_automatic_compiled,
    "dense": dense,
    "dense, narrow": dense_narrow,
    "TRL, dense": trl_dense,
    "TRL 1.16": trl,
    "Liger": liger,
    "Liger, compiled": liger_compiled,
}


def one_time(method: Method, x: Inputs, shape: Shape) -> tuple[float, float]:
    """Seconds, and the loss."""
    x.student.grad = x.student_weight.grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = method(x, shape)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, float("nan") if loss is None else loss.item()


def times(names: list[str], shape: Shape, rounds: int) -> dict[str, tuple[float, float]]:
    """The shortest time of each method, in turn, and its loss."""
    x, best = Inputs.of(shape), {}
    for _ in range(rounds + 1):  # the first round compiles and warms up
        for name in names:
            seconds, loss = one_time(METHODS[name], x, shape)
            best[name] = (min(seconds, best.get(name, (float("inf"), 0))[0]), loss)
    return best


def peak(name: str, shape: Shape) -> float:
    """Megabytes beyond the inputs at the worst moment, in this process."""
    x = Inputs.of(shape)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        METHODS[name](x, shape)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # What imports and threads cost is paid before.
    METHODS[name](Inputs.of(Shape(**{**asdict(shape), "tokens": 8, "vocabulary": 64})), shape)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes("VmRSS")
    METHODS[name](x, shape)
    return (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: peaks are measured on Linux")


def peak_apart(name: str, shape: Shape) -> float:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.fused_divergence", "--peak", name]
    done = subprocess.run(
        [*command, json.dumps(asdict(shape))], capture_output=True, text=True, check=False
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


PEERS = {"TRL, dense", "TRL 1.16", "Liger", "Liger, compiled"}
"""Methods that compute the generalized JSD and the forward KL, and nothing else."""


def is_possible(name: str, shape: Shape) -> bool:
    """Whether a method computes the row of the grid, and differs from another one there."""
    if name in PEERS and shape.divergence not in {"generalized_jsd", "forward_kl"}:
        return False
    return name != "dense, narrow" or shape.dtype != "float32"


def print_row(shape: Shape, names: list[str], rounds: int, *, memory: bool) -> dict[str, float]:
    """Measure a row of the grid, print its table, and return the times over that of the products."""
    measured = times(names, shape, rounds)
    table = Table(
        "",
        "seconds",
        "times products",
        "times ours",
        "peak MB",
        "of ours",
        "loss",
        title=str(shape),
    )
    peaks = {name: peak_apart(name, shape) if memory else float("nan") for name in names}
    for name, (seconds, loss) in measured.items():
        ratios = [seconds / measured[to][0] for to in ("products", "ours")]
        table.add_row(
            name,
            f"{seconds:.3f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{peaks[name]:.0f}",
            f"{peaks[name] / peaks['ours']:.2f}",
            f"{loss:.5f}",
        )
    Console(width=140).print(table)
    return {name: seconds / measured["products"][0] for name, (seconds, _) in measured.items()}


def print_ratios(rows: dict[Shape, dict[str, float]]) -> None:
    """Print the times of all rows over those of the products, side by side."""
    names = [name for name in METHODS if any(name in ratios for ratios in rows.values())]
    table = Table("times products", *names)
    for shape, ratios in rows.items():
        title = f"{shape.divergence}, {shape.tokens} x {shape.vocabulary}, {shape.dtype}"
        title += f", {shape.scored:.0%} scored" if shape.scored < 1 else ""
        table.add_row(title, *(f"{ratios[n]:.2f}" if n in ratios else "" for n in names))
    Console(width=200).print(table)


def main() -> None:
    """Run the rows that are asked for."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    grid = {
        "tokens": [512, 2048, 4096],
        "vocabulary": [32_000, 151_936],
        "dtype": ["float32", "bfloat16"],
        "scored": [1.0, 0.5],
        "divergence": ["generalized_jsd", "forward_kl"],
    }
    for name, values in grid.items():
        parser.add_argument(f"--{name}", nargs="+", type=type(values[0]), default=values)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--teacher-hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, shape = arguments.peak
        print(peak(name, Shape(**json.loads(shape))))
        return
    names = [name for name in METHODS if name in {"products", "ours", *arguments.methods}]
    if arguments.divergence == ["every"]:
        arguments.divergence = available_divergences()
    rows = {}
    for row in itertools.product(*(getattr(arguments, name) for name in grid)):
        shape = Shape(*row, arguments.hidden, arguments.teacher_hidden)
        wanted = [name for name in names if is_possible(name, shape)]
        rows[shape] = print_row(shape, wanted, arguments.rounds, memory=not arguments.no_memory)
    print_ratios(rows)


if __name__ == "__main__":
    main()
