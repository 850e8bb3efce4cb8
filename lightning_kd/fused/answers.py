"""Answers of a teacher at the scored positions of a micro-batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_kd.fused.lazy_logits import LazyLogits, PaddedLogits
from lightning_kd.fused.teacher_rows import (
    Combine,
    DistributionRows,
    TeacherRows,
    single_model_log_probs,
)

AnswerKind = Literal[
    "full_distribution",
    "top_k",
    "top_k_and_token",
    "sampled",
    "token_log_probs",
    "chunk_log_probs",
    "chunk_start_distributions",
]
"""Kind of answer at a position: all probabilities; the k highest; these and that of the token that
follows; tokens drawn at random; the probability of the token that follows alone. Of a teacher with
other tokens: how likely chunks of text are; all probabilities of its tokens where a chunk begins."""

ALIGNED_KINDS: frozenset[AnswerKind] = frozenset({"chunk_log_probs", "chunk_start_distributions"})
"""Kinds of a teacher with other tokens, about chunks of the text."""

SURPLUS = 1e-2
"""Distance from a total probability of 1 that computing in half precision explains, before the
probabilities are rounded."""


class TeacherAnswer(ABC):
    """Answer of a teacher at the N scored positions of a micro-batch, without a gradient."""

    kind: ClassVar[AnswerKind]

    @property
    def sources(self) -> tuple[LazyLogits, ...]:
        """Lazy logits, computed a chunk at a time; none if the answer is small."""
        return ()

    def narrowed(self, width: int) -> "TeacherAnswer":
        """Return the answer over the first ``width`` tokens of the vocabulary."""
        return self

    @abstractmethod
    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TeacherRows:
        """Return the answer at some positions.

        Args:
            rows: The positions.
            logits: Those of :attr:`sources` there.
            width: Tokens of the student's vocabulary.

        Raises:
            ValueError: If the answer is no distribution.
        """

    @abstractmethod
    def check(self, positions: int, width: int) -> None:
        """Validate the answer.

        Args:
            positions: How many there are.
            width: Tokens of the vocabulary.

        Raises:
            ValueError: If the answer is about other positions or tokens, or no probabilities.
        """


@dataclass(frozen=True)
class FullDistribution(TeacherAnswer):
    """The logits of every token, and how those of several models become one distribution."""

    kind = "full_distribution"
    logits: tuple[LazyLogits, ...]
    """Of each model, ``(N, V)``."""
    combine: Combine = single_model_log_probs

    @property
    def sources(self) -> tuple[LazyLogits, ...]:
        """The logits of each model."""
        return self.logits

    def narrowed(self, width: int) -> "FullDistribution":
        """The first ``width`` tokens, renormalized."""
        return replace(self, logits=tuple(source.narrowed(width) for source in self.logits))

    @property
    def shares(self) -> tuple[float | Tensor, ...]:
        """What each model weighs among all, everywhere or at each position; they add up to 1."""
        return (1 / len(self.logits),) * len(self.logits)

    def computed(self, rows: slice) -> DistributionRows:
        """Compute the logits at some positions, and return the distributions there."""
        logits = []
        for source in self.logits:
            shape = (rows.stop - rows.start, source.shape[1])
            out = torch.empty(shape, dtype=source.dtype, device=source.device)
            source.fill(rows, out)
            logits.append(out)
        return self.rows(rows, logits, self.logits[0].shape[1])

    def padded(self, width: int) -> "FullDistribution":
        """The same distribution over more tokens, which have probability 0."""
        wide = (s if s.shape[1] == width else PaddedLogits(s, width) for s in self.logits)
        return replace(self, logits=tuple(wide))

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> DistributionRows:
        """Return the distribution over all tokens."""
        return DistributionRows(logits, self.combine)

    def check(self, positions: int, width: int) -> None:
        """Compare shapes."""
        lazy = isinstance(self.logits, tuple) and all(
            isinstance(s, LazyLogits) for s in self.logits
        )
        if not lazy or not self.logits:
            raise ValueError(
                "the logits of the teacher's full_distribution must be a tuple of LazyLogits, one of "
                f"each model, such as (MaterializedLogits(logits),); got {type(self.logits).__name__}"
            )
        check_shape(self.kind, [source.shape[0] for source in self.logits], positions)
        narrowest = min(source.shape[1] for source in self.logits)
        if narrowest < width:
            raise ValueError(
                f"the teacher's full_distribution has logits of {narrowest} tokens, and the teacher "
                f"says that it knows {width}; return as many as its vocabulary_size"
            )


@dataclass(frozen=True)
class TokenLogProbs(TeacherAnswer):
    """The log-probability of the token that each scored position predicts, at temperature 1."""

    kind = "token_log_probs"
    values: Tensor
    """``(N,)``; 0 where there is no token."""

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TeacherRows:
        """Refuse: one token's probability is no distribution."""
        raise ValueError(
            "the teacher answers the log-probability of one token at each position, and this term "
            "compares distributions; use a teacher that answers full_distribution or top_k"
        )

    def check(self, positions: int, width: int) -> None:
        """Compare the shape, and look for what is not a probability."""
        check_shape(self.kind, [len(self.values)], positions)
        if self.values.ndim != 1:
            raise ValueError(
                f"the teacher's token_log_probs have shape {tuple(self.values.shape)}; give one for "
                "each position, (positions,)"
            )
        check_log_probs(self.kind, self.values)


def check_shape(kind: str, lengths: Sequence[int], positions: int) -> None:
    """Refuse an answer about another number of positions.

    Raises:
        ValueError: If one of the lengths differs from it.
    """
    if any(length != positions for length in lengths):
        raise ValueError(
            f"the teacher's {kind} is about {min(lengths)} positions, but {positions} are scored: "
            "answer at every position that was asked for, in their order"
        )


def rounding(log_probs: Tensor) -> Tensor:
    """Return what rounding to their type may have changed in a sum of probabilities, ``(N,)``.

    Example:
        >>> sum_of_all = torch.full((1, 512), 1 / 512).log().bfloat16()
        >>> rounding(sum_of_all)
        tensor([0.0244], dtype=torch.float64)
    """
    exact = log_probs.double()
    relative = (exact.abs() * torch.finfo(log_probs.dtype).eps / 2).expm1()
    return (exact.exp() * relative).sum(-1)


def are_log_probs(values: Tensor) -> bool:
    """Return whether all values are finite and 0 or less, up to rounding."""
    # Rounded to bfloat16, the logarithm of nearly 1 can be a little above 0.
    return bool((values.isfinite() & (values <= SURPLUS)).all())


def check_log_probs(kind: str, log_probs: Tensor) -> None:
    """Refuse values that are no log-probabilities.

    Raises:
        ValueError: If they are no floats, or one is not finite or above 0 by more than rounding
            explains.
    """
    if not log_probs.is_floating_point():
        raise ValueError(
            f"the teacher's {kind} has log-probabilities of type {log_probs.dtype}; they must be floats"
        )
    if not are_log_probs(log_probs):
        raise ValueError(
            f"the teacher's {kind} has values that are no log-probabilities: they must be finite "
            "and 0 or less, in nats"
        )
