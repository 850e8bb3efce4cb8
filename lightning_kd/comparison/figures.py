"""Pictures of a comparison."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_kd.comparison.curves import Curve, curve, read_scalars
from lightning_kd.comparison.experiment import Experiment
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.statistics import summarize
from lightning_kd.comparison.tables import Results, by_run

_LINES = ("-", "--", ":", "-.")


def check_can_draw() -> None:
    """Validate that matplotlib is there.

    Raises:
        ValueError: If it is not.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib: pip install 'lightning-kd[plot]'")


def draw_curves(
    experiment: Experiment, directories: Mapping[str, Sequence[Path]], place: Path
) -> list[str]:
    """Draw metrics over steps and seconds, with a band of one standard deviation over seeds.

    Args:
        experiment: Names the metrics.
        directories: Of each run, one for each seed.
        place: The picture.

    Returns:
        What is not in it, in a line each: metrics that no run has logged. Without any there is no
        picture.
    """
    logged = {run: [read_scalars(d) for d in found] for run, found in directories.items()}
    drawn = {
        metric: {run: made for run, seeds in logged.items() if (made := curve(seeds, metric.name))}
        for metric in experiment.curves
    }
    given = sorted({name for seeds in logged.values() for found in seeds for name in found})
    missing = [
        f"no run logged {metric.name}, which has no curve; logged are {', '.join(given) or 'none'}"
        for metric, curves in drawn.items()
        if not curves
    ]
    drawn = {metric: curves for metric, curves in drawn.items() if curves}
    if not drawn:
        return missing
    figure = _figure(len(drawn), 2)
    axes = figure.subplots(len(drawn), 2, squeeze=False)
    for (over_steps, over_time), (metric, curves) in zip(axes, drawn.items(), strict=True):
        for number, variant in enumerate(experiment.variants):
            if variant.name not in curves:
                continue
            style = {"color": f"C{number % 10}", "linestyle": _LINES[number // 10 % len(_LINES)]}
            made = curves[variant.name]
            _plot(over_steps, made.steps, made, variant.label, style)
            if made.seconds:
                _plot(over_time, made.seconds, made, variant.label, style)
        for axis, label in ((over_steps, "optimizer step"), (over_time, "seconds of training")):
            axis.set(title=metric.shown, xlabel=label, yscale=metric.scale)
            axis.grid(alpha=0.3)
    _legend(figure, experiment)
    figure.savefig(place, dpi=100)
    return missing


def draw_bars(
    experiment: Experiment, results: Results, metrics: Sequence[Metric], place: Path
) -> None:
    """Draw the mean of each metric with its standard deviation, and a dot for each seed.

    Numbers that are not finite are left out.

    Args:
        experiment: Names the runs.
        results: Of one budget.
        metrics: One panel for each.
        place: The picture.
    """
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = _figure(lines, columns)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, metric in zip(axes, metrics, strict=False):
        values = by_run(results, "metrics", metric.name)
        having = [v for v in experiment.variants if v.name in values]
        for place_on_axis, variant in enumerate(having):
            seeds = [*values[variant.name].values()]
            summary = summarize(seeds)
            color = f"C{experiment.variants.index(variant) % 10}"
            if math.isfinite(summary.mean):
                axis.bar(
                    place_on_axis, summary.mean, yerr=summary.deviation, color=color, alpha=0.6
                )
            finite = [seed for seed in seeds if math.isfinite(seed)]
            axis.scatter([place_on_axis] * len(finite), finite, color="black", s=9, zorder=3)
        axis.set_xticks(range(len(having)), [v.label for v in having], rotation=30, ha="right")
        axis.set(title=metric.shown, yscale=metric.scale)
        axis.grid(alpha=0.3, axis="y")
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    figure.savefig(place, dpi=100)


def _plot(
    axis: Any, at: Sequence[float], made: Curve, label: str, style: Mapping[str, Any]
) -> None:
    means = [mean if math.isfinite(mean) else math.nan for mean in made.mean]
    axis.plot(at, means, marker=".", label=label, **style)
    if any(made.deviation):
        pairs = list(zip(means, made.deviation, strict=True))
        low, high = [m - d for m, d in pairs], [m + d for m, d in pairs]
        axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _legend(figure: Any, experiment: Experiment) -> None:
    """Name the runs above all panels: not every one of them is in each."""
    drawn: dict[str, Any] = {}
    for axis in figure.axes:
        lines, labels = axis.get_legend_handles_labels()
        drawn |= dict(zip(labels, lines, strict=True))
    labels = [v.label for v in experiment.variants if v.label in drawn]
    figure.legend([drawn[label] for label in labels], labels, loc="outside upper center", ncols=4)


def _figure(lines: int, columns: int) -> Any:
    from matplotlib.figure import Figure  # of the extra plot

    return Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
