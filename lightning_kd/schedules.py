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


class AdaptiveShare(Schedule):
    """A share that grows whenever validation has become worse: DistiLLM's adaptive scheduler.

    It starts at ``start``. When a validation is worse than the last one that has made it grow, or than
    the first, by ``tolerance`` or more, it grows by ``increase``, to 1 at most. It is in checkpoints.
    For ``lmbda`` of ``on_policy``: the student's share of windows grows when learning from the data no
    longer helps.

    Args:
        start: Share before anything has become worse, in [0, 1].
        increase: What is added each time, above 0 and at most 1.
        tolerance: Smallest rise that counts, 0 or more; in nats, of a loss.
        monitor: What validation logs that is better the lower it is.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> share = AdaptiveShare(increase=0.25, tolerance=0.1)
        >>> for loss in (2.0, 2.05, 2.2, 1.5, 2.25, 2.5):
        ...     share.update(loss)
        >>> share(0)
        0.5

    References:
        Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
        Algorithm 1. https://arxiv.org/abs/2402.03898
    """

    def __init__(
        self,
        start: float = 0.0,
        increase: float = 0.1,
        tolerance: float = 0.1,
        monitor: str = "val/loss",
    ) -> None:
        _require_share(start=start, increase=increase)
        if increase == 0 or not tolerance >= 0:
            raise ValueError(
                f"increase is {increase} and tolerance {tolerance}; the first must be above 0, the "
                "second 0 or more"
            )
        self.start, self.increase, self.tolerance = start, increase, tolerance
        self.monitor = monitor
        self.forget_run()

    def forget_run(self) -> None:
        """Begin a run, with no validation seen."""
        self.share, self._reference = self.start, math.inf

    def __call__(self, step: int) -> float:
        """What validations so far have come to."""
        return self.share

    @property
    def has_heard(self) -> bool:
        """Whether any validation has measured what it follows."""
        return self._reference != math.inf

    def update(self, value: float) -> None:
        """Hear of a validation that has measured what it follows; NaN is neither better nor worse."""
        if math.isfinite(self._reference):
            if not value >= self._reference + self.tolerance:
                return
            self.share = min(1.0, self.share + self.increase)
        # Nothing compares with a value that is not finite: the next one is as the first.
        self._reference = value if math.isfinite(value) else math.nan

    def state_dict(self) -> dict[str, float]:
        """Return the share and what the next validation is compared with."""
        return {"share": self.share, "reference": self._reference}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.share, self._reference = state["share"], state["reference"]


def _require_share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a share, in [0, 1]")
