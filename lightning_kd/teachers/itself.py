"""The student as its own teacher."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, FullDistribution
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.modes import evaluating
from lightning_kd.models.sharding import is_sharded
from lightning_kd.models.vocabulary import VocabularyPolicy, vocabulary_size
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import with_members
from lightning_kd.teachers.contract import Ability, Teacher

Convert = Callable[[PreTrainedModel], object]
"""Gives the weights of a model the type that the trainer's precision gives the student's."""


class SelfTeacher(Teacher):
    """A teacher whose weights come from the student, which it hears of once that is built.

    It answers in evaluation mode and without a gradient. What it knows better than the student is what
    it reads: data with a ``teacher_prompt_template`` gives it another prompt.
    """

    answers: frozenset[Ability] = frozenset({"full_distribution"})

    follows_student = True

    def __init__(self) -> None:
        self._student: PreTrainedModel | None = None
        self._model: PreTrainedModel | None = None
        self._role = "teacher"
        self._device = torch.device("cpu")
        self._mesh: DeviceMesh | None = None

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Note where the student will be; there is nothing to load."""
        self._role, self._device, self._mesh = role, device, mesh

    def follow(self, student: PreTrainedModel, convert: Convert) -> None:
        """Take the weights of a student that was just built; the same one again changes nothing.

        Args:
            student: Whole on this process, for a teacher that copies it.
            convert: Called with a copy.

        Raises:
            ValueError: If it cannot be copied.
        """
        if self._student is not student:
            self._model, self._student = self.weights_of(student, convert), student

    @abstractmethod
    def weights_of(self, student: PreTrainedModel, convert: Convert) -> PreTrainedModel:
        """Return the model that answers; see :meth:`follow`."""

    @property
    def model(self) -> PreTrainedModel:
        """The model that answers.

        Raises:
            ValueError: If there is no student, as where nothing trains.
        """
        if self._model is None:
            raise ValueError(
                f"{type(self).__name__} has the weights of the student that a method trains, and there "
                "is none here: it answers in fit, validate and test alone, and is neither cached nor "
                "served. Export the student, and give its directory as LocalTeacher"
            )
        return self._model

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """The model that answers, from :meth:`follow` on."""
        return {} if self._model is None else {self._role: self._model}

    @property
    def answers_collectively(self) -> bool:
        """Whether its weights are sharded."""
        return self._model is not None and is_sharded(self._model)

    @property
    def vocabulary_size(self) -> int:
        """Width of the student's logits."""
        return vocabulary_size(self.model)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> FullDistribution:
        """Run the model on a batch and return its logits at the scored positions."""
        with evaluating(self.model):
            logits = logits_backend.read(self.model, batch, positions)
        return FullDistribution((logits.detached_to(batch["input_ids"].device),))

    def after_step(self) -> None:
        """Hear that an optimizer step has changed the student; does nothing by default."""

    def state(self, *, wanted: bool) -> dict[str, Tensor]:
        """Return weights that a checkpoint must have; all processes call it together.

        Args:
            wanted: Whether this process saves them; others may return nothing.
        """
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` has returned; all processes call it together."""

    def copy_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return the type of a copied weight; None where none is copied."""
        return None


class LiveStudent(SelfTeacher):
    """The student as it is, in each micro-batch: no second copy of any weight.

    Adapters of a student (LoRA) take part as they are. Only its context tells it from the student, so
    data that gives it none is refused.

    References:
        *On-Policy Self-Distillation*, 2026. https://arxiv.org/abs/2601.18734

    Example:
        >>> LiveStudent().answers
        frozenset({'full_distribution'})
    """

    def weights_of(self, student: PreTrainedModel, convert: Convert) -> PreTrainedModel:
        """Return the student itself."""
        return student


def self_teachers(teacher: Teacher) -> list[SelfTeacher]:
    """Return the teachers among one and its members whose weights come from the student."""
    return [each for each in with_members(teacher) if isinstance(each, SelfTeacher)]
