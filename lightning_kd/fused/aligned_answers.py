"""Answers of a teacher that reads the text in tokens of its own."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused.answers import (
    FullDistribution,
    TeacherAnswer,
    check_log_probs,
    check_shape,
)
from lightning_kd.fused.lazy_logits import LazyLogits, MaterializedLogits, RoutedLogits
from lightning_kd.fused.logits_chunk import TokenTerm
from lightning_kd.fused.teacher_rows import TeacherRows
from lightning_kd.fused.token_terms import LogRatio


@dataclass(frozen=True)
class AlignedAnswer(TeacherAnswer):
    """What a teacher with other tokens knows of the chunks of text that both sides share.

    The chunks of a micro-batch are numbered from 0 to C - 1, in the order of the rows and of the text.
    """

    chunks: Tensor
    """Chunk of the token behind each scored position, ``(N,)``; -1 for one in no chunk."""
    starts: Tensor
    """Place of the first token of each chunk among the scored positions, ``(C,)``."""
    ends: Tensor
    """Place of the last one, ``(C,)``."""

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over the tokens of each chunk, differentiable: ``(N,) -> (C,)``."""
        return _sums(values, self.chunks, len(self.ends))

    def at_tokens(self, values: Tensor) -> Tensor:
        """Return for each token the value of its chunk, 0 for one in none: ``(C,) -> (N,)``."""
        return F.pad(values, (0, 1))[self.chunks]

    def at_ends(self, values: Tensor) -> Tensor:
        """Return the value of each chunk at its last token, 0 elsewhere: ``(C,) -> (N,)``."""
        return values.new_zeros(len(self.chunks)).index_copy(0, self.ends, values)

    def in_chunks(self, targets: Tensor) -> Tensor:
        """Return the tokens that are in chunks, ``IGNORE_INDEX`` for others, ``(N,)``."""
        return targets.masked_fill(self.chunks < 0, IGNORE_INDEX)

    def check(self, positions: int, width: int) -> None:
        """Compare shapes, and look at the numbers of the chunks."""
        check_shape(self.kind, [len(self.chunks)], positions)
        count = len(self.ends)
        numbers = torch.arange(count, device=self.chunks.device)
        told = len(self.starts) == count and (self.chunks < count).all()
        if not (
            told and all((self.chunks[at] == numbers).all() for at in (self.starts, self.ends))
        ):
            raise ValueError(
                f"the teacher's {self.kind} names {count} chunks; number them from 0 to {count - 1} in "
                "the order of the text, each with at least one of the student's tokens"
            )
        self._check_told(width)

    @abstractmethod
    def _check_told(self, width: int) -> None:
        """Validate what is told of the chunks.

        Raises:
            ValueError: If it is about other chunks or tokens, or no probabilities.
        """


@dataclass(frozen=True)
class ChunkLogProbs(AlignedAnswer):
    """How likely the text is to the teacher, token by token of its own, and what chunk each is in.

    Example:
        >>> chunks, starts, ends = map(torch.tensor, ([0, 0, 1], [0, 2], [1, 2]))
        >>> own, log_probs = torch.tensor([0, 1, 1]), torch.tensor([-1.0, -2.0, -4.0])
        >>> answer = ChunkLogProbs(chunks, starts, ends, log_probs, own, since=chunks)
        >>> answer.log_probs, answer.sums(torch.tensor([0.5, 0.25, 1.0]))
        (tensor([-1., -6.]), tensor([0.7500, 1.0000]))
        >>> answer.at_tokens(answer.log_probs), answer.at_ends(answer.log_probs)
        (tensor([-1., -1., -6.]), tensor([ 0., -1., -6.]))
    """

    kind = "chunk_log_probs"
    token_log_probs: Tensor
    """Of each of the teacher's tokens, at temperature 1, ``(M,)``."""
    token_chunks: Tensor
    """Chunk of each of them, ``(M,)``; -1 for one in no chunk."""
    since: Tensor
    """First chunk whose extent the token behind each scored position has a part in, ``(N,)``; -1 for
    none. It is the token's own chunk, or one before it whose end may depend on the token."""

    @property
    def log_probs(self) -> Tensor:
        """Log-probability of the text of each chunk, behind the text before it, ``(C,)``."""
        return _sums(self.token_log_probs, self.token_chunks, len(self.ends))

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TeacherRows:
        """Refuse: tokens of another vocabulary are no distribution over the student's."""
        raise ValueError(
            "the teacher answers how likely chunks of text are, in tokens of its own, and this term "
            "compares distributions over the student's tokens; use a teacher with the student's "
            "tokenizer, or a method that compares chunks, such as ChunkLikelihoodKD"
        )

    def _check_told(self, width: int) -> None:
        check_log_probs(self.kind, self.token_log_probs)
        check_shape(self.kind, [len(self.since)], len(self.chunks))
        if self.token_chunks.shape != self.token_log_probs.shape:
            raise ValueError(
                f"the teacher's {self.kind} has {tuple(self.token_log_probs.shape)} log-probabilities "
                f"and {tuple(self.token_chunks.shape)} chunks of tokens; give one chunk for each token"
            )


@dataclass(frozen=True)
class ChunkStartDistributions(AlignedAnswer):
    """The teacher's distribution over its own tokens where a chunk begins.

    There both sides have read the same text. At all other positions there is none, and logits of 0
    stand in for it.
    """

    kind = "chunk_start_distributions"
    distribution: FullDistribution
    """At the beginning of each chunk, over the teacher's tokens, ``(C, V')``."""

    @property
    def begins(self) -> Tensor:
        """True where a chunk begins, ``(N,)``."""
        return torch.zeros_like(self.chunks, dtype=torch.bool).index_fill(0, self.starts, True)

    @property
    def sources(self) -> tuple[LazyLogits, ...]:
        """The logits of each model at all scored positions, ``(N, V')``."""
        elsewhere = torch.ones_like(self.chunks).index_fill(0, self.starts, 0)
        return tuple(_spread(source, elsewhere) for source in self.distribution.logits)

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TeacherRows:
        """Return the distributions over the teacher's tokens."""
        return self.distribution.rows(rows, logits, width)

    def _check_told(self, width: int) -> None:
        self.distribution.check(len(self.starts), width)


def _sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    # What is in no chunk goes into one behind the last.
    total = values.new_zeros(count + 1)
    return total.index_add(0, chunks.remainder(count + 1), values)[:count]


def _spread(source: LazyLogits, elsewhere: Tensor) -> LazyLogits:
    """Return logits at all positions, of which some have none (1) and the others (0) the source's."""
    others = len(elsewhere) - source.shape[0]
    zero = torch.zeros(1, 1, dtype=source.dtype, device=source.device)
    nothing = MaterializedLogits(zero.expand(others, source.shape[1]))
    return RoutedLogits((source, nothing), elsewhere)


def chunk_log_ratio(tokens: Tensor, answer: ChunkLogProbs) -> TokenTerm:
    r"""Return the log-ratio of student and teacher, :math:`\log q - \log p`, summed over the text.

    The student's part stands at each token and the teacher's at the last token of each chunk, so that
    the sum over a text is :math:`\log q(\text{tokens}) - \log p(\text{text})`.

    Args:
        tokens: The student's, ``(N,)``.
        answer: The teacher's.
    """
    return LogRatio(answer.in_chunks(tokens), answer.at_ends(answer.log_probs))
