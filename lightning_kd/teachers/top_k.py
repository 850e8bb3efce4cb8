"""A teacher that tells k tokens of what another one knows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, FullDistribution, TopK
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import CompositeTeacher
from lightning_kd.teachers.contract import Ability, Teacher, checked_answer
from lightning_kd.teachers.given import TeacherLike, as_teacher


class TopKTeacher(CompositeTeacher):
    """The k most likely tokens of a teacher, and the one that follows; the rest is one event.

    It shows, with a teacher in this process, what a method learns from one that is served or cached
    and tells no more. What an ensemble of unequal vocabularies gives to tokens that not all members
    have is cut off before. Completions are not generated from here.

    Args:
        teacher: A teacher that answers ``full_distribution``.
        k: Tokens that are told at each position.
        temperatures: Those at which the probability of the rest is told. Defaults to 1 alone.

    Raises:
        ValueError: If the teacher does not tell all tokens, or a value is out of its range.

    Example:
        >>> from lightning_kd.teachers import LocalTeacher
        >>> TopKTeacher(LocalTeacher("./teacher"), k=16, temperatures=[1.0, 2.0]).k
        16
    """

    answers: frozenset[Ability] = frozenset({"top_k", "top_k_and_token"})

    def __init__(
        self,
        teacher: TeacherLike,
        *,
        k: int,
        temperatures: list[float] | None = None,
    ) -> None:
        self.teacher, self.k = as_teacher(teacher, "the teacher of TopKTeacher"), k
        self.check_members()
        if "full_distribution" not in self.teacher.answers:
            raise ValueError(
                f"TopKTeacher needs a teacher that answers full_distribution; {self.described_answers}"
            )
        if k < 1:
            raise ValueError(f"k is {k}; it is a number of tokens, 1 or more")
        told = [1.0] if temperatures is None else temperatures
        if not told or not all(temperature > 0 for temperature in told):
            raise ValueError(f"temperatures are {told}; give one or more, all positive")
        self._told = sorted(told)
        self.temperatures = frozenset(told)

    @property
    def named_members(self) -> Mapping[str, Teacher]:
        """The teacher."""
        return {"whole": self.teacher}

    def routes(self, batch: Batch) -> tuple[Sequence[str], Tensor] | None:
        """Return those of the teacher."""
        return self.teacher.routes(batch)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "top_k_and_token",
        logits_backend: LogitsBackend,
    ) -> TopK:
        """Return the most likely tokens of the teacher's distribution.

        Raises:
            ValueError: If the teacher knows fewer tokens than k.
        """
        whole = checked_answer(
            self.teacher, batch, positions, kind="full_distribution", logits_backend=logits_backend
        )
        # Of several members with unequal vocabularies, over the tokens that all have.
        whole = whole.narrowed(self.vocabulary_size)
        assert isinstance(whole, FullDistribution)  # checked_answer compares the kind
        short = top_k_of(whole, positions.targets, self.k, temperatures=self._told)
        return short if kind == "top_k_and_token" else short.without_label()
