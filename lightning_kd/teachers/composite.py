"""Base of teachers that are made of teachers."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.fused import FullDistribution
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.resuming import Plain
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.contract import Ability, Teacher


class CompositeTeacher(Teacher):
    """A teacher made of others."""

    @property
    @abstractmethod
    def named_members(self) -> Mapping[str, Teacher]:
        """Its members, each with its name in messages and in the seeds of random weights."""

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that must not change, members as the teachers that they are."""
        made = {n: vars(self)[n] for n in ("members", "teacher") if n in vars(self)}
        return super().resume_settings() | made

    def check_members(self) -> None:
        """Validate the members.

        Raises:
            ValueError: If there are none.
        """
        if not self.named_members:
            raise ValueError(f"{type(self).__name__} needs at least one member; got none")

    @property
    def shared_answers(self) -> frozenset[Ability]:
        """Kinds of answers that all members give."""
        return frozenset.intersection(
            *(frozenset(member.answers) for member in self.named_members.values())
        )

    @property
    def shared_temperatures(self) -> frozenset[float] | None:
        """Temperatures that all members declare; None for any."""
        declared = [m.temperatures for m in self.named_members.values()]
        known = [temperatures for temperatures in declared if temperatures is not None]
        return frozenset.intersection(*known) if known else None

    @property
    def described_answers(self) -> str:
        """The answers of each member, for messages."""
        return ", ".join(
            f"{name} ({type(member).__name__}) answers {' and '.join(sorted(member.answers))}"
            for name, member in self.named_members.items()
        )

    @property
    def vocabulary_size(self) -> int:
        """The smallest of the members'."""
        return min(member.vocabulary_size for member in self.named_members.values())

    @property
    def model_specs(self) -> Sequence[ModelSpec]:
        """Specs of all members' models."""
        return [spec for member in self.named_members.values() for spec in member.model_specs]

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """Models of all members, by their roles."""
        models: dict[str, PreTrainedModel] = {}
        for member in self.named_members.values():
            models |= member.local_models
        return models

    @property
    def longest_row(self) -> int | None:
        """The smallest of the members'."""
        lengths = [member.longest_row for member in self.named_members.values()]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def answers_collectively(self) -> bool:
        """Whether a member does."""
        return any(member.answers_collectively for member in self.named_members.values())

    @property
    def is_remote(self) -> bool:  # type: ignore[override]
        """Whether a member is."""
        return any(member.is_remote for member in self.named_members.values())

    @property
    def follows_student(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(member.follows_student for member in self.named_members.values())

    @property
    def answers_any_text(self) -> bool:
        """Whether all members can be asked about any."""
        return all(member.answers_any_text for member in self.named_members.values())

    @property
    def looks_at_texts(self) -> bool:
        """Whether a member does."""
        return any(member.looks_at_texts for member in self.named_members.values())

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """Those that any member reads."""
        return frozenset().union(*(member.columns for member in self.named_members.values()))

    def forget(self) -> None:
        """Tell every member."""
        for member in self.named_members.values():
            member.forget()

    def check_precision(self, precision: str) -> None:
        """Tell every member."""
        for member in self.named_members.values():
            member.check_precision(precision)

    def check_texts(
        self, texts: Iterable[tuple[Batch, ScoredPositions]], encoding: Plain = None
    ) -> None:
        """Let every member look at every text."""
        for text in texts:
            for member in self.named_members.values():
                if member.looks_at_texts:
                    member.check_texts([text], encoding)

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Prepare every member, under a role of its own.

        Raises:
            ValueError: If one cannot be prepared, or is as wide as the student while another is not.
        """
        for name, member in self.named_members.items():
            member.prepare(tokenizer, device, policy, mesh, f"{role} {name}")
        if policy == "equal" and not self.follows_student:
            self.check_vocabularies("vocabulary: equal")

    def check_data(self, data: object) -> None:
        """Let every member check the data."""
        for member in self.named_members.values():
            member.check_data(data)

    def check_vocabularies(self, reason: str) -> None:
        """Refuse members of unequal vocabularies.

        Args:
            reason: What needs equal ones, for the message.

        Raises:
            ValueError: If they are unequal.
        """
        sizes = {name: member.vocabulary_size for name, member in self.named_members.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"the members of {type(self).__name__} have unequal vocabularies ({listed}), and "
                f"{reason} needs equal ones. With vocabulary: shared, members that answer "
                "full_distribution are cut to the tokens that all have"
            )


def with_members(teacher: Teacher) -> Iterator[Teacher]:
    """Yield a teacher, its members, and the members of these."""
    yield teacher
    if isinstance(teacher, CompositeTeacher):
        for member in teacher.named_members.values():
            yield from with_members(member)


def same_width(answers: Sequence[FullDistribution]) -> tuple[FullDistribution, ...]:
    """Return distributions over the tokens of the widest; others give the rest probability 0."""
    width = max(source.shape[1] for answer in answers for source in answer.logits)
    return tuple(answer.padded(width) for answer in answers)


def wide(values: Tensor) -> Tensor:
    """Return log-probabilities in float32 or wider, in which several can be combined."""
    return values if values.dtype == torch.float64 else values.float()
