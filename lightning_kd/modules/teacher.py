"""What methods with a teacher at hand share."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.divergences import ReverseKL
from lightning_kd.evaluation import Matching, Sweep, TeacherLogits, TeacherMassBeyond, look
from lightning_kd.models import (
    SingleTeacher,
    Teacher,
    VocabularyPolicy,
    shared_vocabulary,
    vocabulary_size,
)
from lightning_kd.modules.base import DistillationModule
from lightning_kd.modules.loss import Scores
from lightning_kd.strategies import shard_mesh
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
            self.teacher.prepare(
                self.tokenizer,
                self.trainer.strategy.root_device,
                self.vocabulary,
                shard_mesh(self.trainer),
            )

    def configure_model(self) -> None:
        """Build the student and compare its vocabulary with the teacher's."""
        super().configure_model()
        if self.teacher.models:
            self.width = shared_vocabulary(
                vocabulary_size(self.student), self.teacher.vocabulary_size, self.vocabulary
            )

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The student and the models of the teacher, by role."""
        return super().models | dict(zip(self.teacher.sources, self.teacher.models, strict=False))

    def score(self, batch: Batch) -> Scores:
        """Run student and teacher on the same ids."""
        positions = self.positions(batch)
        teacher = self.teacher.read(batch, positions, self.logits)
        if not self.training or self._logs_this_step():
            self._log_dropped_mass(teacher)
        student = self.logits.read(self.student, batch, positions)
        return Scores(positions, student.narrowed(self.width), teacher.narrowed(self.width))

    def reverse_kl(self, batch: Batch) -> Tensor:
        """Reverse KL at each scored position of a batch, at temperature 1, ``(N,)``."""
        with torch.no_grad():
            scores = self.score(batch)
        return look(Sweep(scores.student, scores.teacher, [Matching(ReverseKL())]))[0]

    def _log_dropped_mass(self, teacher: TeacherLogits) -> None:
        """What the teachers give, on average, to tokens beyond the shared vocabulary."""
        wider = [source for source in teacher.sources if source.shape[1] > self.width]
        if wider and wider[0].shape[0]:
            beyond = [TeacherMassBeyond(self.width)]
            mass = [look(Sweep(None, TeacherLogits((w,)), beyond)).mean() for w in wider]
            stage = "train" if self.training else "val"
            self.log(f"{stage}/teacher_dropped_mass", max(mass), batch_size=wider[0].shape[0])


def require_positive(**temperatures: float) -> None:
    """Refuse a temperature that cannot divide logits.

    Raises:
        ValueError: If one is not positive.
    """
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
