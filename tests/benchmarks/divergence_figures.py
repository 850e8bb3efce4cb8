"""Every divergence on a toy: ``python -m tests.benchmarks.divergence_figures [DIRECTORY]``.

The teacher has two modes on a line of 961 tokens; the student is a Gaussian on the same tokens. Writes
``divergences_curves.png``, each divergence and its gradient over the student's mean, and
``divergences_fits.png``, the best Gaussian under each. What is registered is drawn.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_kd import available_divergences, make_divergence

PLACES = torch.linspace(-6, 6, 961, dtype=torch.float64)
"""Of the tokens on the line."""
MODES = ((0.6, -2.0, 0.7), (0.4, 2.2, 0.9))
"""Of the teacher: weight, mean, deviation."""
MEANS = torch.linspace(-5, 5, 201, dtype=torch.float64)
DEVIATION = 1.0
"""Of the student whose mean moves."""
COLUMNS = 4
NARROWINGS = 14


@dataclass(frozen=True)
class Curve:
    """A divergence over the student's mean, and its slope."""

    values: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Fit:
    """The Gaussian that a divergence is least for."""

    mean: float
    deviation: float
    value: float


def teacher() -> Tensor:
    """Log-probabilities of the tokens."""
    weights, means, deviations = torch.tensor(MODES, dtype=torch.float64).T
    return (
        (_logits(means, deviations) + (weights / deviations).log()[:, None])
        .logsumexp(0)
        .log_softmax(0)
    )


def student(means: Tensor, deviations: Tensor) -> Tensor:
    """Log-probabilities of Gaussians on the tokens, ``(N,), (N,) -> (N, V)``."""
    return _logits(means, deviations).log_softmax(-1)


def curve(name: str, means: Tensor) -> Curve:
    """Evaluate a divergence and the library's gradient of it over the student's mean."""
    deviations = torch.full_like(means, DEVIATION)
    own = student(means, deviations)
    values, gradients = make_divergence(name).value_and_logit_gradient(
        own, teacher().expand_as(own)
    )
    # The logits of a Gaussian move with its mean by (x - mean) / deviation^2.
    slopes = (PLACES - means[:, None]) / DEVIATION**2
    return Curve(values, (gradients * slopes).sum(-1))


def fit(name: str) -> Fit:
    """Search the best mean and deviation on a grid that is narrowed around the best of it."""
    divergence = make_divergence(name)
    means = torch.linspace(-5, 5, 61, dtype=torch.float64)
    deviations = torch.linspace(0.3, 3.3, 31, dtype=torch.float64)
    for _ in range(NARROWINGS):
        pairs = torch.cartesian_prod(means, deviations)
        own = student(pairs[:, 0], pairs[:, 1])
        values = divergence(own, teacher().expand_as(own))
        mean, deviation = pairs[int(values.argmin())]
        means = _around(mean, 2 * (means[1] - means[0]))
        deviations = _around(deviation, 2 * (deviations[1] - deviations[0]))
    return Fit(mean.item(), deviation.item(), values.min().item())


def draw_curves(names: Sequence[str]) -> Figure:
    """One panel for each divergence: its value, its gradient, and the teacher behind them."""
    figure, axes = _panels(names)
    shape = teacher().exp()
    for name, axis in zip(names, axes, strict=True):
        found = curve(name, MEANS)
        slope, top = axis.twinx(), 1.05 * float(found.values.max())
        axis.fill_between(PLACES, 0.4 * top * shape / shape.max(), color="0.87", linewidth=0)
        slope.axhline(0, color="C1", linewidth=0.6, alpha=0.6)
        (dashed,) = slope.plot(MEANS, found.gradients, "C1--", linewidth=1.2, label="gradient")
        (solid,) = axis.plot(MEANS, found.values, "C0-", linewidth=1.6, label="value")
        best = int(found.values.argmin())
        axis.plot(MEANS[best], found.values[best], "C0o", markersize=5)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, top)
        axis.tick_params(labelsize=8, labelcolor="C0", axis="y")
        slope.tick_params(labelsize=8, labelcolor="C1", axis="y")
    figure.legend(handles=[solid, dashed], loc="outside lower right", ncols=2, fontsize=9)
    figure.supxlabel("mean of the student", fontsize=9)
    return figure


def draw_fits(names: Sequence[str]) -> Figure:
    """One panel for each divergence: the teacher, and the student that is best under it."""
    figure, axes = _panels(names)
    shape = teacher().exp()
    for name, axis in zip(names, axes, strict=True):
        found = fit(name)
        axis.fill_between(PLACES, shape, color="0.82", linewidth=0)
        best = student(*torch.tensor([[found.mean], [found.deviation]])).exp()[0]
        axis.plot(PLACES, best, "C3-", linewidth=1.6)
        axis.set_title(
            f"{name}\nmean {found.mean:.2f}, deviation {found.deviation:.2f}", fontsize=9
        )
        axis.set(yticks=[], ylim=(0, 1.8 * float(shape.max())))
        axis.tick_params(labelsize=8)
    figure.supxlabel("grey: the teacher; red: the best Gaussian under the divergence", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs"))
    directory = parser.parse_args(arguments).directory
    names = available_divergences()
    draw_curves(names).savefig(directory / "divergences_curves.png", dpi=80)
    draw_fits(names).savefig(directory / "divergences_fits.png", dpi=80)


def _around(middle: Tensor, reach: Tensor) -> Tensor:
    return middle + reach * torch.linspace(-1, 1, 9, dtype=torch.float64)


def _logits(means: Tensor, deviations: Tensor) -> Tensor:
    return -((PLACES - means[:, None]) ** 2) / (2 * deviations[:, None] ** 2)


def _panels(names: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    rows = -(-len(names) // COLUMNS)
    figure = Figure(
        figsize=(3 * COLUMNS, 2.2 * rows + 0.4), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.set_axis_off()
    return figure, axes[: len(names)]


if __name__ == "__main__":
    main()
