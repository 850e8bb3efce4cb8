"""Base of methods whose loss is a divergence from the teacher."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer

from lightning_kd.batch import Batch
from lightning_kd.divergences import Divergence
from lightning_kd.fused import ChunkedPass, Entropy, evaluate_no_grad, picked
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.interpolation import Interpolation
from lightning_kd.modules.loss import Scores
from lightning_kd.modules.measured import narrow
from lightning_kd.modules.teacher_module import TeacherModule
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import check_instance
from lightning_kd.scoring import highest_in_rows
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike

_CHECKPOINT_KEY = "interpolation"


class DivergenceModule(TeacherModule):
    """A student that learns a divergence from the teacher, or from a target on the way to it.

    A method takes its term ``divergence`` from :meth:`trained_divergence`. Validation is always on the
    divergence from the teacher itself.

    The other options are those of :class:`~lightning_kd.modules.TeacherModule`.

    Args:
        interpolation: Moves the target from the student to the teacher over the run:
            :class:`Interpolation` or :class:`TAID`. Logged as ``train/interpolation``. Without it, the
            target is the teacher.
        position_share: Share of each row's scored positions that take part in training, rounded up:
            those at which the student's distribution has the highest entropy, in (0, 1]. The others
            are neither in any term of the loss nor in what it is divided by. Needs one more pass over
            the student's logits, and spares the teacher's at the others.

    Raises:
        ValueError: If a value is out of its range; in a run, if the teacher's answers do not tell the
            target, or cannot be about some of the positions.

    References:
        Tavor et al., *Rethinking Selective Knowledge Distillation*, 2026 (a share of 0.2).
        https://arxiv.org/abs/2602.01395
    """

    def __init__(
        self,
        *,
        interpolation: Interpolation | None = None,
        position_share: float = 1.0,
        teacher: TeachersLike,
        vocabulary: VocabularyPolicy = "equal",
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        normalization: Normalization | str = "token",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            teacher=teacher,
            vocabulary=vocabulary,
            student=student,
            tokenizer=tokenizer,
            normalization=normalization,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        if interpolation is not None:
            check_instance("interpolation", interpolation, Interpolation, "TAID(steps=1000)")
        self.interpolation = interpolation
        if not 0 < position_share <= 1:
            raise ValueError(
                f"position_share is {position_share}; it is a share of the scored positions of each "
                "row, above 0 and at most 1 (all)"
            )
        self.position_share = position_share

    def setup(self, stage: str) -> None:
        """Begin with the target of a first step; a checkpoint comes later."""
        super().setup(stage)
        if self.interpolation is not None and stage == "fit":
            self.interpolation.begin()

    def check_answers(self) -> None:
        """Refuse a teacher whose answers do not tell what is computed from them."""
        super().check_answers()
        if self.interpolation is not None and self.answer_kind == "sampled":
            raise ValueError(
                "model.interpolation mixes the teacher's probabilities with the student's, and "
                f"{type(self.teacher).__name__} answers tokens drawn from its distribution, which do "
                "not tell them. Leave interpolation out, or take a teacher that answers "
                "full_distribution or top_k"
            )

        if self.position_share < 1 and not self.teacher.answers_any_text:
            raise ValueError(
                f"model.position_share is {self.position_share}, and {type(self.teacher).__name__} "
                "knows its texts at all of their scored positions together: which of them take part "
                "depends on the student. Leave position_share out, or take a teacher that answers for "
                "any text, such as LocalTeacher"
            )

    def training_scores(self, batch: Batch) -> Scores:
        """Run the models on a micro-batch, the teacher at the positions that take part."""
        if self.position_share == 1:
            return self.score(batch)
        labeled = self.positions(batch)
        student = self.logits_backend.read(self.student, batch, labeled)
        own = ChunkedPass(student.narrowed(self.width), None, [Entropy()])
        chosen = highest_in_rows(evaluate_no_grad(own)[0], labeled, self.position_share)
        positions = labeled.subset(chosen)
        self.coming = None  # of the next micro-batch nobody knows yet which will take part
        teacher = self.teacher_answer(batch, positions)
        self.train_distribution.check(teacher)
        return Scores(positions, picked(student, chosen), teacher).narrowed(self.width)

    def trained_divergence(self, divergence: Divergence) -> Divergence:
        """Return the divergence that the present optimizer step minimizes."""
        if self.interpolation is None:
            return divergence
        return self.interpolation.between(divergence, self.global_step, self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients; log the share of the teacher."""
        super().on_before_optimizer_step(optimizer)
        if self.interpolation is not None:
            share = self.interpolation.share(self.global_step, self.device)
            self.log("train/interpolation", narrow(share))

    @property
    def follows_steps(self) -> bool:
        """Whether the teacher or the target moves on with each optimizer step that is taken."""
        return self.interpolation is not None or super().follows_steps

    def after_step(self, step: int) -> None:
        """Let them move on."""
        super().after_step(step)
        if self.interpolation is not None:
            loss = self._step_sums.means()["divergence"]
            self.interpolation.update(step, loss, self._step_sums.sums[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save where the target is."""
        super().on_save_checkpoint(checkpoint)
        if self.interpolation is not None:
            checkpoint[_CHECKPOINT_KEY] = self.interpolation.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        if self.interpolation is not None and _CHECKPOINT_KEY in checkpoint:
            self.interpolation.load_state_dict(checkpoint[_CHECKPOINT_KEY])
