"""Contract of metrics of completions, and the functions that stand for one."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import (
    CharErrorRate,
    EditDistance,
    MatchErrorRate,
    WordErrorRate,
    WordInfoLost,
    WordInfoPreserved,
)

CompletionScore = Callable[[str, list[str]], float]
"""``(completion, references) -> number``; the mean over completions is logged under its name."""


class CompletionMetric(Metric):
    """Metric of completions, each beside the texts that it might have been.

    A metric derives from this class, or from any other ``torchmetrics.Metric`` whose ``update`` takes
    completions and lists of references, as ``torchmetrics.text.BLEUScore`` does. What
    :meth:`compute` returns is logged: numbers by their names in a dict, or one number under the
    name of its class (``bleu_score``). States are sums over completions, so that those of several
    processes add up.
    """

    full_state_update = False
    needs_references: ClassVar[bool] = True
    """Whether each completion must have a reference; without, references may be empty lists."""

    @abstractmethod
    def update(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add completions.

        Args:
            completions: Texts, without special tokens.
            references: The texts that each is compared with, one list per completion.

        Raises:
            ValueError: If the metric cannot be computed for one.
        """

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return numbers by their names."""

    def check_references(self, references: Sequence[Sequence[str]]) -> None:
        """Validate references, before anything is generated.

        Raises:
            ValueError: If the metric cannot be computed with one of them.
        """
        check_references(self, references)


class MeanScore(CompletionMetric):
    """Metric that is the mean over completions of numbers that each has for itself.

    Write :meth:`scores`, and :attr:`names`, the name of each number.

    Example:
        >>> class Length(MeanScore):
        ...     names = ("length",)
        ...
        ...     def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        ...         return [len(completion)]
        >>> metric = Length()
        >>> metric.update(["975", "1"], [["975"], ["13"]])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'length': 2.0}
    """

    names: Sequence[str]
    """Name of each number of :meth:`scores`."""
    sums: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    @abstractmethod
    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """Return the numbers of one completion, in the order of :attr:`names`."""

    def update(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add completions."""
        self.check_references(references)
        rows = [self._row(c, r) for c, r in zip(completions, references, strict=True)]
        added = torch.stack(rows).sum(0) if rows else torch.zeros_like(self.sums)
        # Out of place: what an evaluation leaves in inference mode cannot be changed outside of it.
        self.sums = self.sums + added.to(self.sums.device)
        self.total = self.total + len(rows)

    def _row(self, completion: str, references: Sequence[str]) -> Tensor:
        """Return the numbers of a completion, ``(names,)``.

        Raises:
            ValueError: If the scores cannot be computed, with the completion.
        """
        try:
            row = torch.as_tensor(self.scores(completion, references), dtype=torch.float64)
            return row.reshape(len(self.names))
        except Exception as error:
            raise failed(self, completion, error) from error

    def compute(self) -> dict[str, Tensor]:
        """The means by name; 0 without a completion."""
        means = self.sums / self.total.clamp(min=1)
        return dict(zip(self.names, means.unbind(), strict=True))


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
    CharErrorRate,
    EditDistance,
    MatchErrorRate,
    WordErrorRate,
    WordInfoLost,
    WordInfoPreserved,
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


def failed(metric: Metric, completion: str, error: Exception) -> ValueError:
    """Return the error of a metric that has raised one.

    Args:
        metric: The metric.
        completion: What it was to measure.
        error: What it has raised.
    """
    return ValueError(
        f"the metric {metric_name(metric)} failed for the completion {completion!r:.80}: "
        f"{type(error).__name__}: {error}"
    )


def metric_name(metric: Metric) -> str:
    """Return the name by which a metric is spoken of: that of its class, or of its function."""
    if isinstance(metric, MeanOfFunction):
        return metric.names[0]
    return type(metric.metric if isinstance(metric, OneReference) else metric).__name__


def check_references(metric: Metric, references: Sequence[Sequence[str]]) -> None:
    """Validate that a metric has the references that it needs.

    Raises:
        ValueError: If it has not.
    """
    for number, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(
                f"the references of completion {number} are the text {texts!r:.40}; give a list of "
                "texts for each completion"
            )
        if not texts and getattr(metric, "needs_references", True):
            raise ValueError(
                f"{metric_name(metric)} compares completions with references, and the data has none "
                "for a prompt. Give the column of completions, data.references_column, or only metrics "
                "that need none (DistinctN, Repetition)"
            )


def computed(metric: Metric) -> dict[str, Tensor]:
    """Return the numbers of a metric by the names that they are logged under.

    Raises:
        ValueError: If something in it is no number.

    Example:
        >>> from torchmetrics.text import BLEUScore
        >>> bleu = BLEUScore(n_gram=1)
        >>> bleu.update(["a b"], [["a c", "b"]])
        >>> computed(bleu)
        {'bleu_score': tensor(1.)}
    """
    found = metric.compute()
    values = found if isinstance(found, Mapping) else {_snake_case(type(metric).__name__): found}
    for name, value in values.items():
        if not isinstance(value, Tensor | float | int) or torch.as_tensor(value).numel() != 1:
            raise ValueError(
                f"{metric_name(metric)} computes {value!r:.80} as {name}; what is logged is one number "
                "for each name"
            )
    # Whole numbers are averaged by no logger.
    numbers = {name: torch.as_tensor(value).reshape(()) for name, value in values.items()}
    return {
        n: value if value.is_floating_point() else value.float() for n, value in numbers.items()
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
