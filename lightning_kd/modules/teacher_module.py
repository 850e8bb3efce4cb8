"""What methods with a teacher at hand share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.batch import Batch
from lightning_kd.divergences import ReverseKL
from lightning_kd.evaluation import DistributionMetrics
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    StudentMassBeyond,
    TeacherLogits,
    TeacherMassBeyond,
    evaluate_no_grad,
)
from lightning_kd.models import VocabularyPolicy, shared_vocabulary, vocabulary_size
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.loss import Evaluation, LossTerm, Scores
from lightning_kd.strategies import shard_mesh
from lightning_kd.teachers import LocalTeacher, Teacher

_LARGE_MASS = 0.01
"""A probability beyond the shared vocabulary that padding does not have."""


class TeacherModule(DistillationModule):
    """A student that is compared with a frozen teacher on the same tokens.

    Args:
        teacher: One model, or a :class:`~lightning_kd.teachers.TeacherEnsemble`.
        vocabulary: ``equal`` refuses logits of different widths; ``shared`` cuts both to the
            narrower one before the softmax, so that each is renormalized over the tokens that they
            share. What a wider side gives to its other tokens is not in the loss, and is logged as
            ``student_dropped_mass`` or ``teacher_dropped_mass``.
        base: The options of :class:`~lightning_kd.modules.DistillationModule`.
    """

    learns_from_its_start: ClassVar[bool] = False
    """Is there something to learn beside a teacher that is the student as it starts?"""

    def __init__(
        self,
        *,
        teacher: LocalTeacher | Teacher,
        vocabulary: VocabularyPolicy = "equal",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.teacher = teacher
        self.vocabulary: VocabularyPolicy = vocabulary
        self._warned_of: set[str] = set()

    width: int
    """Logits of student and teacher that are compared."""

    def setup(self, stage: str) -> None:
        """Load the teacher where it is needed, beside the student."""
        super().setup(stage)
        if stage == "fit":
            self._check_teacher()
        if stage != "predict":
            self.teacher.prepare(
                self.tokenizer,
                self.trainer.strategy.root_device,
                self.vocabulary,
                shard_mesh(self.trainer),
            )

    def _check_teacher(self) -> None:
        """Refuse a teacher that is the student, from which there is nothing to learn.

        Raises:
            ValueError: If it is the same model object, or comes from where the student does.
        """
        student, teachers = self.student_spec, list(self.teacher.sources.values())
        if any(student.is_same_object(teacher) for teacher in teachers):
            raise ValueError(
                "student and teacher are one model object, which cannot also be frozen"
            )
        if self.learns_from_its_start or len(teachers) > 1:
            return
        if any(student.is_same_checkpoint(teacher) for teacher in teachers):
            raise ValueError(
                f"student and teacher are both {student.name_or_path!r}: the student starts as its "
                "teacher, and nothing pulls it anywhere else. Give another teacher, or a copy of the "
                "directory if that is what you want"
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
        teacher = self.teacher.read(batch, positions, self.logits_backend)
        uncut = Scores(positions, self.logits_backend.read(self.student, batch, positions), teacher)
        return Scores(
            positions, uncut.student.narrowed(self.width), teacher.narrowed(self.width), uncut
        )

    def reverse_kl(self, batch: Batch) -> Tensor:
        """Reverse KL at each scored position of a batch, at temperature 1, ``(N,)``."""
        with torch.no_grad():
            scores = self.score(batch)
        return evaluate_no_grad(
            ChunkedPass(scores.student, scores.teacher, [DivergenceTerm(ReverseKL())])
        )[0]

    def _evaluate(
        self, scores: Scores, terms: Mapping[str, LossTerm], metrics: DistributionMetrics | None
    ) -> Evaluation:
        if metrics is not None and scores.uncut is not None:
            metrics.update_dropped(*self._dropped(scores.uncut), scores.positions.targets)
        return super()._evaluate(scores, terms, metrics)

    def _dropped(self, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
        """What student and teacher give to tokens beyond the shared vocabulary, ``(N,)`` each.

        Of several teachers, the one that gives most to them.
        """
        of_student, of_teacher = None, None
        if scores.student.shape[1] > self.width:
            of_student = evaluate_no_grad(
                ChunkedPass(scores.student, None, [StudentMassBeyond(self.width)])
            )[0]
        wider = [s for s in scores.teacher.sources if s.shape[1] > self.width]  # type: ignore[union-attr]
        if wider:
            beyond = [TeacherMassBeyond(self.width)]
            masses = [
                evaluate_no_grad(ChunkedPass(None, TeacherLogits((w,)), beyond))[0] for w in wider
            ]
            of_teacher = torch.stack(masses).amax(0)
        return of_student, of_teacher

    def _log_distribution(self, stage: str, metrics: DistributionMetrics) -> set[str]:
        shown = super()._log_distribution(stage, metrics)
        for name in metrics.dropped_names:
            mass = self.trainer.callback_metrics.get(f"{stage}/{name}", torch.zeros(()))
            if mass > _LARGE_MASS and name not in self._warned_of:
                self._warned_of.add(name)
                side = name.partition("_")[0]
                rank_zero_warn(
                    f"the {side} gives {mass:.1%} of its probability to tokens beyond the "
                    f"{self.width} that are compared ({stage}/{name}). Both sides are renormalized "
                    "over those, so the loss does not see it; vocabulary: shared is meant for "
                    "surplus that is padding"
                )
        return shown


def require_positive(**temperatures: float) -> None:
    """Refuse a temperature that cannot divide logits.

    Raises:
        ValueError: If one is not positive.
    """
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
