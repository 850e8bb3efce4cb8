"""Base of teachers that are made of teachers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.fused import AnswerKind
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.teachers.contract import Ability, Teacher


class CompositeTeacher(Teacher):
    """A teacher made of others."""

    @property
    @abstractmethod
    def named_members(self) -> Mapping[str, Teacher]:
        """Its members, each with its name in messages and in the seeds of random weights."""

    def check_members(self) -> None:
        """Validate the members.

        Raises:
            ValueError: If there are none, or one is no teacher.
        """
        if not self.named_members:
            raise ValueError(f"{type(self).__name__} needs at least one member; got none")
        for name, member in self.named_members.items():
            if not isinstance(member, Teacher):
                raise ValueError(
                    f"member {name} of {type(self).__name__} is a {type(member).__name__}; give a "
                    "teacher, such as LocalTeacher"
                )

    @property
    def shared_answers(self) -> frozenset[Ability]:
        """Kinds of answers that all members give."""
        return frozenset.intersection(*(member.answers for member in self.named_members.values()))

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
    def answers_collectively(self) -> bool:
        """Whether a member does."""
        return any(member.answers_collectively for member in self.named_members.values())

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Prepare every member, under a role of its own."""
        for name, member in self.named_members.items():
            member.prepare(tokenizer, device, policy, mesh, f"{role} {name}")

    def check_vocabularies(self, kind: AnswerKind) -> None:
        """Refuse members of unequal vocabularies, for answers that cannot be renormalized.

        Raises:
            ValueError: If they are unequal.
        """
        sizes = {name: member.vocabulary_size for name, member in self.named_members.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"the members of {type(self).__name__} know {listed} tokens; with {kind} they need as "
                "many as each other, for the probability of a subset is not known"
            )
