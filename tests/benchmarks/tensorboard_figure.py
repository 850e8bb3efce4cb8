"""The custom scalars of several runs: ``python -m tests.benchmarks.tensorboard_figure LOGDIR OUT.png``.

Draws the charts of :data:`~lightning_kd.callbacks.tensorboard_layout.LAYOUT` that the event files below
LOGDIR have values for, one colour for each run, as TensorBoard shows them after ``lightning-kd demo``.
"""

import argparse
import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.callbacks.tensorboard_layout import LAYOUT

SHOWN = ("Loss", "Student and teacher", "Text")
COLUMNS = 3
STYLES = ("-", "--", ":", "-.")


def read(logdir: Path) -> dict[str, EventAccumulator]:
    """The event files of each run, by the name of its directory."""
    runs = {}
    for path in sorted(logdir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        if events.Tags()["scalars"]:
            runs[str(path.parent.relative_to(logdir))] = events
    return runs


def charts(runs: dict[str, EventAccumulator]) -> dict[str, list[str]]:
    """The tags of each chart that at least one run has logged, by its title."""
    logged = sorted({tag for events in runs.values() for tag in events.Tags()["scalars"]})
    found = {}
    for group in SHOWN:
        for title, (_, patterns) in LAYOUT[group].items():
            tags = [tag for tag in logged if any(re.match(pattern, tag) for pattern in patterns)]
            if tags:
                found[title] = tags
    return found


def draw(runs: dict[str, EventAccumulator], out: Path) -> None:
    """One panel for each chart; runs have colours, tags of a chart have line styles."""
    panels = charts(runs)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    colors = {run: f"C{number}" for number, run in enumerate(runs)}
    for axis, (title, tags) in zip(axes, panels.items(), strict=False):
        for tag, style in zip(tags, STYLES, strict=False):
            for run, events in runs.items():
                if tag in events.Tags()["scalars"]:
                    points = [(event.step + 1, event.value) for event in events.Scalars(tag)]
                    axis.plot(*zip(*points, strict=True), style, color=colors[run], linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(tags) > 1:
            lines = [
                Line2D([], [], linestyle=style, color="gray", label=tag)
                for tag, style in zip(tags, STYLES, strict=False)
            ]
            axis.legend(handles=lines, fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=color, label=run) for run, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)
    figure.savefig(out, dpi=75)


def main() -> None:
    """Read the arguments, draw, and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    arguments = parser.parse_args()
    runs = read(arguments.logdir)
    if not runs:
        parser.error(f"there are no event files below {arguments.logdir}")
    draw(runs, arguments.out)
    print(f"{len(runs)} runs: {arguments.out}")


if __name__ == "__main__":
    main()
