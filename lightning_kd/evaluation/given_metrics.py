"""What may stand for a metric of completions: a function, or a metric of one reference."""

import inspect
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, text

from lightning_kd.evaluation.completion_metric import (
    CompletionMetric,
    CompletionScore,
    MeanScore,
    check_references,
    computed,
    failed,
    metric_name,
)


class MeanOfFunction(MeanScore):
    """Mean over completions of what a function gives, under the function's name.

    Args:
        function: Takes a completion and the list of its references, which is empty where the data
            has none, and returns a finite number.

    Raises:
        ValueError: If it cannot be called so, or has no name to log under.

    Example:
        >>> def begins_well(completion: str, references: list[str]) -> float:
        ...     return float(completion[:1] in {text[:1] for text in references})
        >>> metric = MeanOfFunction(begins_well)
        >>> metric.update(["975", "12"], [["9"], ["2", "3"]])
        >>> metric.compute()["begins_well"].item()
        0.5
    """

    needs_references: ClassVar[bool] = False

    def __init__(self, function: CompletionScore) -> None:
        name = getattr(function, "__name__", "")
        if not name.isidentifier():
            raise ValueError(
                f"the metric {function!r:.80} has no name to be logged under; write it with def"
            )
        try:
            inspect.signature(function).bind("", [""])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the metric {name} does not take what it is given ({error}): a completion and the "
                "list of its references"
            ) from error
        self.names = (name,)
        super().__init__()
        self.function = function

    @property
    def title(self) -> str:
        """The function's name."""
        return self.names[0]

    def _row(self, completion: str, references: Sequence[str]) -> Tensor:
        # What the function raises is told from what it gives.
        return torch.tensor(self.scores(completion, references), dtype=torch.float64)

    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """What the function gives."""
        try:
            given = self.function(completion, list(references))
        except Exception as error:
            raise failed(self, completion, error) from error
        try:
            value = torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = torch.empty(0)
        if value.numel() != 1 or not value.isfinite().all():
            raise ValueError(
                f"the metric {self.names[0]} gave {given!r:.80} for the completion "
                f"{completion!r:.80}; it must give one finite number"
            )
        return [value.item()]


_OF_ONE_TEXT = (
    text.CharErrorRate,
    text.EditDistance,
    text.MatchErrorRate,
    text.WordErrorRate,
    text.WordInfoLost,
    text.WordInfoPreserved,
)
"""Metrics of torchmetrics that compare each completion with one text, not with a list."""


class OneReference(CompletionMetric):
    """A metric that compares each completion with one text, on completions of one reference each.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    @property
    def title(self) -> str:
        """The metric's own."""
        return type(self.metric).__name__

    def check_references(self, references: Sequence[Sequence[str]]) -> None:
        """Validate that each completion has one reference.

        Raises:
            ValueError: If one has none or several.
        """
        check_references(self, references)
        several = [texts for texts in references if len(texts) > 1]
        if several:
            raise ValueError(
                f"{metric_name(self)} compares a completion with one reference, and there are "
                f"{len(several[0])} for one; give data.references_column a column of one text each, or "
                "take a metric of the best of several (RougeL, torchmetrics.text.BLEUScore)"
            )

    def update(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add completions."""
        self.check_references(references)
        self.metric.update(list(completions), [texts[0] for texts in references])

    def compute(self) -> dict[str, Tensor]:
        """What the metric computes."""
        return computed(self.metric)

    def reset(self) -> None:
        """Forget all completions."""
        super().reset()
        self.metric.reset()


def as_metric(given: Metric | CompletionScore) -> Metric:
    """Return a metric of completions, made of a function where one was given.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(given, _OF_ONE_TEXT):
        return OneReference(given)
    if isinstance(given, Metric):
        return given
    if isinstance(given, type) or not callable(given):
        kind = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
        raise ValueError(
            f"metrics has {kind:.80}; give metrics (ExactMatch()) or functions of a completion and its "
            "references"
        )
    return MeanOfFunction(given)
