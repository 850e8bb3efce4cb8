"""What methods with a teacher at hand share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.divergences import ReverseKL
from lightning_kd.models import (
    SingleTeacher,
    Teacher,
    VocabularyPolicy,
    shared_vocabulary,
    vocabulary_size,
)
from lightning_kd.modules.base import DistillationModule
from lightning_kd.scoring import Scores
from lightning_kd.types import Batch


class TeacherModule(DistillationModule):
    """A student that is compared with a frozen teacher on the same tokens.

    Args:
        teacher: One model, or a :class:`~lightning_kd.models.TeacherEnsemble`.
        vocabulary: ``equal`` refuses logits of different widths; ``shared`` cuts both to the
            narrower one before the softmax.
        base: The options of :class:`~lightning_kd.modules.DistillationModule`.
    """

    def __init__(
        self,
        *,
        teacher: SingleTeacher | Teacher,
        vocabulary: VocabularyPolicy = "equal",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.teacher = teacher
        self.vocabulary: VocabularyPolicy = vocabulary

    width: int
    """Logits of student and teacher that are compared."""

    def setup(self, stage: str) -> None:
        """Load the teacher where it is needed, beside the student."""
        super().setup(stage)
        if stage != "predict":
            self.teacher.prepare(self.tokenizer, self.trainer.strategy.root_device, self.vocabulary)

    def configure_model(self) -> None:
        """Build the student and compare its vocabulary with the teacher's."""
        super().configure_model()
        if self.teacher.models:
            self.width = shared_vocabulary(
                vocabulary_size(self.student), self.teacher.vocabulary_size, self.vocabulary
            )

    def score(self, batch: Batch) -> Scores:
        """Run student and teacher on the same ids."""
        positions = self.positions(batch)
        teacher_logits = self.teacher.logits(batch, positions)
        shared = [logits[:, : self.width] for logits in teacher_logits]
        self._log_dropped_mass(teacher_logits)
        student_logits = self._student_logits(batch, positions)[:, : self.width]
        return Scores(positions, student_logits, tuple(shared))

    def teacher_log_probs(self, scores: Scores) -> Tensor:
        """The teacher's log-probabilities at temperature 1."""
        assert scores.teacher_logits is not None  # score() put them there
        return self.teacher.log_probs(scores.teacher_logits)

    def both_log_probs(
        self, scores: Scores, *, student_temperature: float = 1.0, teacher_temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher, ``(N, V)`` each; gradients to the student."""
        assert scores.teacher_logits is not None  # score() put them there
        student = (scores.student_logits / student_temperature).log_softmax(-1)
        return student, self.teacher.log_probs(scores.teacher_logits, teacher_temperature)

    @torch.no_grad()
    def reverse_kl(self, batch: Batch) -> Tensor:
        """Reverse KL at each scored position of a batch, at temperature 1, ``(N,)``."""
        return ReverseKL()(*self.both_log_probs(self.score(batch)))

    def _log_dropped_mass(self, teacher_logits: Sequence[Tensor]) -> None:
        """What the teachers give, on average, to tokens beyond the shared vocabulary."""
        wider = [logits for logits in teacher_logits if logits.shape[-1] > self.width]
        if wider and len(wider[0]):
            mass = [u.softmax(-1)[:, self.width :].sum(-1).mean() for u in wider]
            stage = "train" if self.training else "val"
            self.log(f"{stage}/teacher_dropped_mass", max(mass), batch_size=len(wider[0]))


def require_positive(**temperatures: float) -> None:
    """Refuse a temperature that cannot divide logits.

    Raises:
        ValueError: If one is not positive.
    """
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
