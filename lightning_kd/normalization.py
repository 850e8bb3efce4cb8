r"""Normalization: what a loss is divided by.

A loss is :math:`L = \sum_b w_b \sum_{t \in b} \ell_{b,t} \,/\, C`: every row :math:`b` of the optimizer
step has a weight that depends only on its number of scored tokens :math:`n_b`, and one count
:math:`C` belongs to the whole optimizer step, over all micro-batches and all ranks.

===========  =============  ================================  =====================================
name         :math:`w_b`    :math:`C`                         the loss is
===========  =============  ================================  =====================================
`token`      1              :math:`\sum_b n_b`                the mean over all tokens
`sequence`   :math:`1/n_b`  rows with :math:`n_b > 0`         the mean of each row's mean
`batch`      1              rows with :math:`n_b > 0`         the mean of each row's sum
`constant`   1              rows with :math:`n_b > 0`, times  a sum over a constant (Dr. GRPO)
                            ``max_length``
===========  =============  ================================  =====================================

Weights are known before the forward pass and counts add up, so the gradient of the weighted sum is
divided once per optimizer step, and it does not matter how the step was cut into micro-batches and
ranks. Averaging the means of the pieces, the usual way, gives another gradient for each cut.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kd.resuming import Resumable


class Normalization(Resumable, ABC):
    """Row weights and a count, from the number of scored tokens in each row."""

    name: ClassVar[str]

    @abstractmethod
    def row_weights(self, tokens_per_row: Tensor) -> Tensor:
        """Weight of every token of a row: ``(B,) -> (B,)``, float64."""

    @abstractmethod
    def count(self, tokens_per_row: Tensor) -> Tensor:
        """Compute the rows' part of the divisor of the optimizer step: ``(B,) -> ()``, float64."""

    def __repr__(self) -> str:
        """The class name; parameters only where there are any."""
        return f"{type(self).__name__}()"


class TokenMean(Normalization):
    """Mean over all scored tokens of the optimizer step.

    Example:
        >>> TokenMean().count(torch.tensor([3, 1, 0]))
        tensor(4., dtype=torch.float64)
    """

    name = "token"

    def row_weights(self, tokens_per_row: Tensor) -> Tensor:
        """Every token weighs the same."""
        return torch.ones_like(tokens_per_row, dtype=torch.float64)

    def count(self, tokens_per_row: Tensor) -> Tensor:
        """The scored tokens."""
        return tokens_per_row.sum(dtype=torch.float64)


class BatchMean(TokenMean):
    """Sum over the tokens of a row, mean over rows; long rows weigh more.

    Example:
        >>> BatchMean().count(torch.tensor([3, 1, 0]))
        tensor(2., dtype=torch.float64)
    """

    name = "batch"

    def count(self, tokens_per_row: Tensor) -> Tensor:
        """The rows in which anything is scored."""
        return (tokens_per_row > 0).sum(dtype=torch.float64)


class SequenceMean(BatchMean):
    """Mean over rows of each row's mean: every row weighs the same (equation 2 of the GKD paper).

    Example:
        >>> SequenceMean().row_weights(torch.tensor([4, 1, 0]))
        tensor([0.2500, 1.0000, 0.0000], dtype=torch.float64)
    """

    name = "sequence"

    def row_weights(self, tokens_per_row: Tensor) -> Tensor:
        """One over the row's tokens; 0 for a row without any."""
        return (tokens_per_row > 0) / tokens_per_row.clamp(min=1).double()


class ConstantLength(BatchMean):
    """Sum over all tokens, divided by rows times a fixed length (Dr. GRPO).

    Args:
        max_length: The fixed length, usually the longest completion that is allowed.

    Raises:
        ValueError: If ``max_length`` is not positive.

    Example:
        >>> ConstantLength(max_length=8).count(torch.tensor([3, 1]))
        tensor(16., dtype=torch.float64)

    References:
        Liu et al., *Understanding R1-Zero-Like Training*, 2025. https://arxiv.org/abs/2503.20783
    """

    name = "constant"

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; give the longest completion, 1 or more")
        self.max_length = max_length

    def count(self, tokens_per_row: Tensor) -> Tensor:
        """The rows in which anything is scored, times the fixed length."""
        return super().count(tokens_per_row) * self.max_length

    def __repr__(self) -> str:
        """Class and length."""
        return f"ConstantLength(max_length={self.max_length})"


_BY_NAME: dict[str, type[Normalization]] = {
    cls.name: cls for cls in (TokenMean, SequenceMean, BatchMean)
}


def divisor(count: Tensor) -> Tensor:
    """Return the divisor of sums: the count, or 1 if nothing was scored, so that 0/0 is 0.

    Example:
        >>> divisor(torch.tensor([3.0, 0.0]))
        tensor([3., 1.])
    """
    return torch.where(count > 0, count, torch.ones_like(count))


def check_counts(what: str, counts: Tensor, sums: Tensor) -> None:
    """Validate the counts of an optimizer step, over all ranks.

    Args:
        what: What is divided, for the message.
        counts: ``(k,)``.
        sums: What each divides; 0 where nothing is scored.

    Raises:
        ValueError: If one is not positive where there is something to divide.

    Example:
        >>> check_counts("the loss", torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    """
    if not ((counts > 0) | ((counts == 0) & (sums == 0))).all():
        raise ValueError(
            f"the normalization of {what} has the count {counts.tolist()} for sums of {sums.tolist()}; "
            "it must be positive, and 0 only where nothing is scored"
        )


def constant_ratio(first: Normalization, second: Normalization) -> float | None:
    """Return the ratio of two counts, where it is the same for all rows; None where it depends on them.

    Example:
        >>> constant_ratio(ConstantLength(max_length=8), SequenceMean())
        8.0
        >>> constant_ratio(TokenMean(), SequenceMean())
    """
    if isinstance(first, BatchMean) and isinstance(second, BatchMean):  # both count rows
        row = torch.ones(1)
        return (first.count(row) / second.count(row)).item()
    return 1.0 if type(first) is type(second) is TokenMean else None


def make_normalization(normalization: Normalization | str) -> Normalization:
    """Build a normalization from its name, or hand an instance back.

    Raises:
        ValueError: If the name is unknown (the choices are listed) or needs a parameter.

    Example:
        >>> make_normalization("sequence")
        SequenceMean()
    """
    if isinstance(normalization, Normalization):
        return normalization
    if normalization == ConstantLength.name:
        raise ValueError(
            "the normalization 'constant' needs a length: give ConstantLength with max_length=..."
        )
    if normalization not in _BY_NAME:
        raise ValueError(
            f"unknown normalization {normalization!r}; choose one of {', '.join(_BY_NAME)}, or "
            "ConstantLength with its max_length"
        )
    return _BY_NAME[normalization]()
