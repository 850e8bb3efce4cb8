"""Numbers that change over a run."""

import math
from abc import ABC, abstractmethod

from lightning_kd.resuming import Resumable


class Schedule(Resumable, ABC):
    """A share in [0, 1] at each optimizer step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at an optimizer step, counted from 0."""


class Constant(Schedule):
    """The same at every step.

    Args:
        value: In [0, 1].
    """

    def __init__(self, value: float) -> None:
        _require_share(value=value)
        self.value = value

    def __call__(self, step: int) -> float:
        """The value."""
        return self.value


class Linear(Schedule):
    """From ``start`` to ``end`` in a straight line over ``steps`` optimizer steps.

    Args:
        start: Value at step 0, in [0, 1].
        end: Value from ``steps`` on, in [0, 1].
        steps: Optimizer steps in between, 1 or more.

    Example:
        >>> Linear(0.0, 1.0, steps=10)(5)
        0.5
    """

    def __init__(self, start: float, end: float, *, steps: int) -> None:
        _require_share(start=start, end=end)
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be 1 or more")
        self.start, self.end, self.steps = start, end, steps

    def __call__(self, step: int) -> float:
        """The value on the way."""
        return self.start + (self.end - self.start) * self.progress(min(1.0, step / self.steps))

    def progress(self, share: float) -> float:
        """Return how far the value is, in [0, 1], after a ``share`` of the steps."""
        return share


class Cosine(Linear):
    """From ``start`` to ``end`` along half a cosine: slowly at both ends.

    Example:
        >>> round(Cosine(1.0, 0.0, steps=4)(1), 3)
        0.854
    """

    def progress(self, share: float) -> float:
        """Half a cosine."""
        return (1 - math.cos(math.pi * share)) / 2


class Steps(Schedule):
    """One value after another.

    Args:
        values: In [0, 1]; one more than ``boundaries``.
        boundaries: Optimizer steps at which the next value begins, rising.

    Example:
        >>> schedule = Steps([0.0, 0.5, 1.0], boundaries=[100, 200])
        >>> [schedule(step) for step in (99, 100, 500)]
        [0.0, 0.5, 1.0]
    """

    def __init__(self, values: list[float], *, boundaries: list[int]) -> None:
        for value in values:
            _require_share(value=value)
        if len(values) != len(boundaries) + 1 or sorted(set(boundaries)) != boundaries:
            raise ValueError(
                f"values {values} and boundaries {boundaries}: there must be one value more than "
                "boundaries, and these must rise"
            )
        self.values, self.boundaries = values, boundaries

    def __call__(self, step: int) -> float:
        """The value whose turn it is."""
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


def _require_share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a share, in [0, 1]")
