"""Contract of metrics of completions."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

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

    @property
    def title(self) -> str:
        """The name by which messages speak of it."""
        return type(self).__name__

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
    return metric.title if isinstance(metric, CompletionMetric) else type(metric).__name__


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
