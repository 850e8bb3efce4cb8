"""Repeated and distinct n-grams, of tokens or of words."""

import hashlib
from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_kd.evaluation.completion_metric import CompletionMetric
from lightning_kd.option_checks import is_number


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence, in order.

    Example:
        >>> ngrams("abc", 2)
        [('a', 'b'), ('b', 'c')]
    """
    return list(zip(*(items[start:] for start in range(n)), strict=False))


def repeated_ngrams(items: Sequence[Hashable], n: int) -> int:
    """Count the n-grams of a sequence that stand earlier in it too.

    Example:
        >>> repeated_ngrams([1, 1, 1, 2, 1, 1], 2)  # 11 11 12 21 11: the second and last
        2
    """
    found = ngrams(items, n)
    return len(found) - len(set(found))


def distinct_ngrams(rows: Sequence[Sequence[Hashable]], n: int) -> float:
    """Compute the share of distinct n-grams among all n-grams of the rows; 0 if there are none.

    Example:
        >>> distinct_ngrams([[1, 1, 1], [1, 2]], 2)
        0.6666666666666666
    """
    found = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(found)) / max(1, len(found))


class Repetition(CompletionMetric):
    r"""Share of n-grams that stand earlier in the same completion: ``repetition_4``.

    .. math:: \sum_b (G_b - U_b) \Big/ \sum_b G_b

    with :math:`G_b` the n-grams of words of a completion and :math:`U_b` the different ones among
    them; in [0, 1), and 0 where no completion is so long. Words are what stands between white space.
    (``rollout/repetition_4`` is the same of tokens.)

    Args:
        n: Words of an n-gram. Short ones recur in any text.

    Raises:
        ValueError: If it is below 1.

    Example:
        >>> metric = Repetition(n=2)
        >>> metric.update(["so so so", "a b"], [[], []])
        >>> metric.compute()["repetition_2"].item()
        0.3333333333333333
    """

    needs_references: ClassVar[bool] = False
    again: Tensor
    total: Tensor

    def __init__(self, n: int = 4) -> None:
        if n < 1:
            raise ValueError(f"n is {n}; it must be 1 or more")
        super().__init__()
        self.n = n
        for name in ("again", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add completions; references are not read."""
        rows = [completion.split() for completion in completions]
        self.again = self.again + sum(repeated_ngrams(row, self.n) for row in rows)
        self.total = self.total + sum(len(ngrams(row, self.n)) for row in rows)

    def compute(self) -> dict[str, Tensor]:
        """The share, by name."""
        return {f"repetition_{self.n}": self.again.double() / self.total.clamp(min=1)}


class DistinctN(CompletionMetric):
    r"""Share of different n-grams among all n-grams of all completions: ``distinct_1`` and so on.

    Over the whole evaluation and all processes, of words, which are what stands between white space.
    It falls with the number of completions: compare only evaluations of as many. 0 where there are
    no n-grams.

    Args:
        n: Words of an n-gram, one number for each metric.

    Raises:
        ValueError: If one is below 1, or none is given.

    References:
        Li et al., *A Diversity-Promoting Objective Function for Neural Conversation Models*, NAACL
        2016. https://arxiv.org/abs/1510.03055

    Example:
        >>> metric = DistinctN(n=[1, 2])
        >>> metric.update(["a b", "a b c"], [[], []])
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'distinct_1': 0.6, 'distinct_2': 0.667}
    """

    needs_references: ClassVar[bool] = False
    total: Tensor

    def __init__(self, n: list[int] | None = None) -> None:
        sizes = [1, 2, 3] if n is None else n
        if not sizes or not all(is_number(size, whole=True) and size >= 1 for size in sizes):
            raise ValueError(f"n is {sizes!r:.80}; give one or more whole numbers, each 1 or more")
        super().__init__()
        self.n = tuple(dict.fromkeys(sizes))
        for size in self.n:
            self.add_state(f"seen_{size}", [], dist_reduce_fx="cat")
        self.add_state("total", torch.zeros(len(self.n), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add completions; references are not read."""
        rows, counts = [completion.split() for completion in completions], []
        for size in self.n:
            found = [gram for row in rows for gram in ngrams(row, size)]
            codes = torch.tensor([_code(gram) for gram in set(found)], dtype=torch.long)
            # Also none: all processes must have something of this type to gather.
            getattr(self, f"seen_{size}").append(codes.to(self.device))
            counts.append(len(found))
        self.total = self.total + torch.tensor(counts, device=self.total.device)

    def compute(self) -> dict[str, Tensor]:
        """The shares, by name."""
        different = torch.tensor([self._different(size) for size in self.n], dtype=torch.float64)
        shares = different / self.total.cpu().clamp(min=1)
        return {
            f"distinct_{size}": share for size, share in zip(self.n, shares.unbind(), strict=True)
        }

    def _different(self, size: int) -> int:
        seen = getattr(
            self, f"seen_{size}"
        )  # a list; one tensor where processes have joined theirs
        return len(torch.unique(dim_zero_cat(seen))) if len(seen) else 0


def _code(gram: tuple[Hashable, ...]) -> int:
    """Return a number that stands for an n-gram on every process, as Python's own hash does not."""
    digest = hashlib.blake2b(repr(gram).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
