"""What methods with a teacher at hand share."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
        temperature: Divides the logits of both before the softmax of the loss. Metrics are at 1.
        base: The options of :class:`~lightning_kd.modules.DistillationModule`.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(
        self,
        *,
        teacher: SingleTeacher | Teacher,
        vocabulary: VocabularyPolicy = "equal",
        temperature: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self.teacher = teacher
        self.vocabulary: VocabularyPolicy = vocabulary
        self.temperature = temperature

    def setup(self, stage: str) -> None:
        """Load the teacher where it is needed, beside the student."""
        super().setup(stage)
        if stage != "predict":
            self.teacher.prepare(self.tokenizer, self.trainer.strategy.root_device, self.vocabulary)

    def configure_model(self) -> None:
        """Build the student and compare its vocabulary with the teacher's."""
        super().configure_model()
        if self.teacher.models:
            self._width = shared_vocabulary(
                vocabulary_size(self.student), self.teacher.vocabulary_size, self.vocabulary
            )

    def score(self, batch: Batch) -> Scores:
        """Run student and teacher on the same ids."""
        positions = self.positions(batch)
        teacher_logits = self.teacher.logits(batch["input_ids"], batch["attention_mask"], positions)
        shared = [logits[:, : self._width] for logits in teacher_logits]
        self._log_dropped_mass(teacher_logits)
        student_logits = self._student_logits(batch, positions)[:, : self._width]
        return Scores(positions, student_logits, tuple(shared))

    def teacher_log_probs(self, scores: Scores) -> Tensor:
        """The teacher's log-probabilities at temperature 1."""
        assert scores.teacher_logits is not None  # score() put them there
        return self.teacher.log_probs(scores.teacher_logits)

    def tempered(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher at the method's temperature, ``(N, V)`` each."""
        assert scores.teacher_logits is not None  # score() put them there
        student = (scores.student_logits / self.temperature).log_softmax(-1)
        return student, self.teacher.log_probs(scores.teacher_logits, self.temperature)

    def _log_dropped_mass(self, teacher_logits: Sequence[Tensor]) -> None:
        """What the teachers give, on average, to tokens beyond the shared vocabulary."""
        wider = [logits for logits in teacher_logits if logits.shape[-1] > self._width]
        if wider and len(wider[0]):
            mass = [u.softmax(-1)[:, self._width :].sum(-1).mean() for u in wider]
            stage = "train" if self.training else "val"
            self.log(f"{stage}/teacher_dropped_mass", max(mass), batch_size=len(wider[0]))
