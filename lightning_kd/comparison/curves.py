"""Values over optimizer steps and seconds of training, from event files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

SECONDS = "train/seconds"
"""Logged by :class:`~lightning_kd.callbacks.TrainingCost`."""


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each step that all of them have, and sample standard deviation."""

    steps: Sequence[int]
    seconds: Sequence[float]
    """Mean seconds of training at these steps; empty where they were not logged."""
    mean: Sequence[float]
    deviation: Sequence[float]
    """Zeros for a single seed."""


def read_scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Return what a run has logged, by name and step.

    A step that was made again, after a run was killed, has the later value.

    Args:
        directory: Of the run's event files.
    """
    found: dict[str, dict[int, float]] = {}
    files = sorted(directory.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tensor_util.make_ndarray(value.tensor).item())
                    found.setdefault(value.tag, {})[event.step] = number
    return found


def curve(runs: Sequence[Mapping[str, Mapping[int, float]]], name: str) -> Curve | None:
    """Return the curve of several seeds; None where no step is common to those that have it.

    Args:
        runs: What each seed has logged.
        name: Of the metric.
    """
    having = [run for run in runs if name in run]
    steps = sorted(set.intersection(*(set(run[name]) for run in having))) if having else []
    if not steps:
        return None
    values = [[run[name][step] for run in having] for step in steps]
    timed = [_seconds_at(run[SECONDS], steps) for run in having if SECONDS in run]
    return Curve(
        # A step is counted from zero where it is logged.
        [step + 1 for step in steps],
        [fmean(times) for times in zip(*timed, strict=True)] if len(timed) == len(having) else [],
        [fmean(each) for each in values],
        [stdev(each) if len(each) > 1 else 0.0 for each in values],
    )


def _seconds_at(seconds: Mapping[int, float], steps: Sequence[int]) -> list[float]:
    known = {-1: 0.0, **seconds}  # none have passed before the first step
    places = sorted(known)
    return [float(x) for x in np.interp(steps, places, [known[step] for step in places])]
