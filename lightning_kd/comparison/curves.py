"""Values over optimizer steps and seconds of training, from event files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from lightning_kd.comparison.statistics import summarize

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

    A run that was killed may have logged steps behind its last checkpoint. Where it goes on, a new file
    begins: a step that was made again has the later value, and what an earlier file has behind the
    first step of a later one is dropped, since the run did not go that way.

    Args:
        directory: Of the event files of one training.
    """
    files = [_read(file) for file in directory.glob("events.out.tfevents.*")]
    found: dict[str, dict[int, float]] = {}
    for _, scalars in sorted(files, key=lambda file: file[0]):
        first = min((step for _, step, _ in scalars), default=math.inf)
        found = {
            tag: {step: value for step, value in values.items() if step <= first}
            for tag, values in found.items()
        }
        for tag, step, value in scalars:
            found.setdefault(tag, {})[step] = value
    return {tag: values for tag, values in found.items() if values}


def _read(file: Path) -> tuple[float, list[tuple[str, int, float]]]:
    """Return when an event file was begun, and its scalars."""
    events = [*EventFileLoader(str(file)).Load()]
    scalars = [
        (value.tag, event.step, float(tensor_util.make_ndarray(value.tensor).item()))
        for event in events
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    ]
    return (events[0].wall_time if events else 0.0), scalars


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
    made = [summarize([run[name][step] for run in having]) for step in steps]
    timed = [_seconds_at(run[SECONDS], steps) for run in having if SECONDS in run]
    return Curve(
        # A step is counted from zero where it is logged.
        [step + 1 for step in steps],
        [fmean(times) for times in zip(*timed, strict=True)] if len(timed) == len(having) else [],
        [each.mean for each in made],
        [each.deviation or 0.0 for each in made],
    )


def _seconds_at(seconds: Mapping[int, float], steps: Sequence[int]) -> list[float]:
    known = {-1: 0.0, **seconds}  # none have passed before the first step
    places = sorted(known)
    return [float(x) for x in np.interp(steps, places, [known[step] for step in places])]
