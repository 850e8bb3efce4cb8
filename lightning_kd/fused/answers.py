"""Answers of a teacher at the scored positions of a micro-batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_kd.fused.lazy_logits import LazyLogits
from lightning_kd.fused.teacher_rows import (
    Combine,
    DistributionRows,
    TeacherRows,
    TopKRows,
    single_model_log_probs,
)

AnswerKind = Literal["full_distribution", "top_k", "token_log_probs"]
"""Kind of answer at a position: all probabilities, the k highest, or that of one token."""

_SURPLUS = 1e-2
"""Excess over a total probability of 1 that rounding to bfloat16 explains."""


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

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> DistributionRows:
        """Return the distribution over all tokens."""
        return DistributionRows(logits, self.combine)

    def check(self, positions: int, width: int) -> None:
        """Compare the number of positions."""
        _check_shape(self.kind, [source.shape[0] for source in self.logits], positions)


@dataclass(frozen=True)
class TopK(TeacherAnswer):
    """The k most likely tokens, at temperature 1; the rest counts as one event, the tail.

    The tail's probability is what the k tokens leave of 1, but no less than the dtype can tell from
    0 there, and the events are normalized: so everything that is computed from them stays finite.
    """

    kind = "top_k"
    token_ids: Tensor
    """``(N, k)``, different at each position."""
    log_probs: Tensor
    """Of these tokens, ``(N, k)``."""

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TopKRows:
        """Return the k tokens, and a tail unless k is the whole vocabulary."""
        known = self.log_probs[rows].double()
        events = known
        if known.shape[1] < width:
            left = 1 - known.exp().sum(-1, keepdim=True)
            smallest = torch.finfo(self.log_probs.dtype).eps
            events = torch.cat([known, left.clamp_min(smallest).log()], -1)
        events = events.log_softmax(-1)
        if self.log_probs.dtype != torch.float64:
            events = events.float()
        return TopKRows(self.token_ids[rows], events)

    def check(self, positions: int, width: int) -> None:
        """Compare shapes, tokens and probabilities."""
        ids, log_probs = self.token_ids, self.log_probs
        _check_shape(self.kind, [len(ids), len(log_probs)], positions)
        if ids.ndim != 2 or ids.shape != log_probs.shape or not 1 <= ids.shape[1] <= width:
            raise ValueError(
                f"the teacher's top_k has token_ids {tuple(ids.shape)} and log_probs "
                f"{tuple(log_probs.shape)}; both must be (positions, k) with k from 1 to {width}"
            )
        ranked = ids.sort(-1).values
        if not ((ids >= 0) & (ids < width)).all() or (ranked.diff(dim=-1) == 0).any():
            raise ValueError(
                f"the token_ids of the teacher's top_k must be different at each position and from "
                f"0 to {width - 1}"
            )
        _check_log_probs(self.kind, log_probs)
        most = log_probs.double().exp().sum(-1)
        if (most > 1 + _SURPLUS).any():
            raise ValueError(
                f"the probabilities of the teacher's top_k add up to {most.max():.4f} at a "
                "position; they must be of the whole vocabulary at temperature 1, and 1 at most"
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
        _check_shape(self.kind, [len(self.values)], positions)
        if self.values.ndim != 1:
            raise ValueError(
                f"the teacher's token_log_probs have shape {tuple(self.values.shape)}; give one for "
                "each position, (positions,)"
            )
        _check_log_probs(self.kind, self.values)


def _check_shape(kind: str, lengths: Sequence[int], positions: int) -> None:
    if any(length != positions for length in lengths):
        raise ValueError(
            f"the teacher's {kind} is about {min(lengths)} positions, but {positions} are scored: "
            "answer at every position that was asked for, in their order"
        )


def _check_log_probs(kind: str, log_probs: Tensor) -> None:
    # Rounded to bfloat16, the logarithm of nearly 1 can be a little above 0.
    if not (log_probs.isfinite() & (log_probs <= _SURPLUS)).all():
        raise ValueError(
            f"the teacher's {kind} has values that are no log-probabilities: they must be finite "
            "and 0 or less, in nats"
        )
