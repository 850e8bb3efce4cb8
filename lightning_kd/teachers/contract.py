"""What a method may ask of a teacher."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, TeacherAnswer
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.resuming import Resumable
from lightning_kd.scoring import ScoredPositions

Ability = AnswerKind | Literal["generation"]
"""What a teacher can do: one of the kinds of answers, or write completions."""


class Teacher(Resumable, ABC):
    """Says how likely next tokens are, and never trains.

    A subclass says in :attr:`answers` what it can tell and writes :attr:`vocabulary_size` and
    :meth:`answer`; it may be a table in memory, a file or a server. One that runs models in this
    process derives from :class:`~lightning_kd.teachers.LocalModels`.

    A teacher is no ``nn.Module``: a module that holds one does not register its weights, so they are
    in no checkpoint, optimizer or gradient bucket.

    Example:
        >>> from lightning_kd.fused import TopK
        >>> class LikesTwo(Teacher):
        ...     answers = frozenset({"top_k"})
        ...     vocabulary_size = 18
        ...     def answer(self, batch, positions, *, kind, logits_backend):
        ...         count = len(positions.targets)
        ...         tokens = torch.tensor([[2, 3]]).expand(count, 2)
        ...         log_probs = torch.tensor([[0.75, 0.125]]).log().expand(count, 2)
        ...         return TopK(tokens, log_probs)
        >>> choose_kind(LikesTwo(), ("full_distribution", "top_k"), "GKD")
        'top_k'
    """

    answers: frozenset[Ability]
    """What it can tell."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """How many tokens it gives probabilities to, from id 0 on; asked after :meth:`prepare`."""

    @abstractmethod
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind,
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Tell what is known of the next token at the scored positions of a micro-batch.

        Args:
            batch: The rows.
            positions: Where; ``positions.targets`` are the tokens that stand there.
            kind: Which of :attr:`answers` is wanted; the same in a whole run.
            logits_backend: The method's, for teachers that run models.

        Returns:
            An answer of this kind on the device of the batch: a
            :class:`~lightning_kd.fused.FullDistribution`, :class:`~lightning_kd.fused.TopK` or
            :class:`~lightning_kd.fused.TokenLogProbs`, at each position in the order of
            ``positions``.
        """

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Make ready to answer, before the first step; called again for each run of a trainer.

        Args:
            tokenizer: The data's.
            device: Of the student, on this process.
            policy: What happens to a wider vocabulary.
            mesh: The processes that share weights; None where none do.

        Raises:
            ValueError: If it cannot answer for this tokenizer or from this process.
        """

    @property
    def sources(self) -> Mapping[str, ModelSpec]:
        """Where each model that runs in this process comes from, by its role."""
        return {}

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """The models that run in this process, by role; empty until :meth:`prepare`."""
        return {}


def choose_kind(
    teacher: Teacher, needs: Sequence[AnswerKind], method: str, others: Sequence[type[Teacher]] = ()
) -> AnswerKind:
    """Return the first kind of answer that a method can use and a teacher can give.

    Args:
        teacher: Asked what it answers.
        needs: What the method can use, the best first.
        method: For the message.
        others: Classes of teachers, of which the message names those that would do.

    Raises:
        ValueError: If there is none.
    """
    for kind in needs:
        if kind in teacher.answers:
            return kind
    able = [other.__name__ for other in others if other.answers & set(needs)]
    raise ValueError(
        f"{method} needs a teacher that answers {' or '.join(needs)}; {type(teacher).__name__} answers "
        f"{', '.join(sorted(teacher.answers)) or 'nothing'}. Of this library's teachers, "
        f"{', '.join(able)} can; or take a method that is content with less"
    )
