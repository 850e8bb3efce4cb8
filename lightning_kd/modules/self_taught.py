"""A module whose teacher may be its student: copied, averaged after each step, and saved."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lightning_kd.batch import Batch, PromptBatch
from lightning_kd.collectives import any_process
from lightning_kd.devices import is_queued
from lightning_kd.models.positions import check_length
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.strategies import adapter_of
from lightning_kd.teacher_rows import check_teacher_rows, has_teacher_rows
from lightning_kd.teachers import (
    CopyOfStudent,
    LiveStudent,
    RoutedTeacher,
    SelfTeacher,
    Teacher,
    self_teachers,
    with_members,
)

_STATES = "self_teachers"
"""Key of a checkpoint for the weights of teachers that follow the student."""

_KINDS = "self_teacher_kinds"
"""Key of a checkpoint for the names of the classes of these teachers."""


class SelfTaughtModule(DistillationModule):
    """A module with a teacher that may follow the student, and may read more than it does.

    The options are those of :class:`~lightning_kd.modules.DistillationModule`.
    """

    teacher: Teacher

    reads_teacher_rows: ClassVar[bool] = True

    learns_from_its_start: ClassVar[bool] = False
    """Whether the method learns anything if the teacher is the student as it starts."""

    _has_teacher = False
    _step_begun: tuple[int, float] | None = None

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """All that the run asks, the teacher first, by their role in messages."""
        return {"teacher": self.teacher}

    @property
    def followers(self) -> list[SelfTeacher]:
        """Those of the teachers, and of their members, whose weights come from the student; each once.

        One may be asked in two roles, and has one step to follow.
        """
        found = [each for teacher in self.teachers.values() for each in self_teachers(teacher)]
        return list({id(each): each for each in found}.values())

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that tells the teacher of optimizer steps."""
        return [*super().configure_callbacks(), _StepFollower()]

    def setup(self, stage: str) -> None:
        """Refuse a strategy under which the student cannot be its own teacher.

        Raises:
            ValueError: If it cannot.
        """
        super().setup(stage)
        self._step_begun = None
        if stage != "predict":
            check_strategy(self.trainer, self.teachers.values())

    def configure_model(self) -> None:
        """Build the student, and let its teacher follow it."""
        super().configure_model()
        self._let_follow()

    def _shard(self) -> None:
        """Let the teacher copy the student while it is whole."""
        self._let_follow()
        super()._shard()

    def _let_follow(self) -> None:
        for each in self.followers if self._has_teacher else ():
            each.follow(self.student, self.trainer.precision_plugin.convert_module)

    # What the teacher reads.

    def check_rows(self, batch: Batch, batch_idx: int) -> None:
        """Validate a batch, and what the teacher reads of it.

        Raises:
            ValueError: If the teacher reads other completions, or longer rows than its models take.
        """
        super().check_rows(batch, batch_idx)
        if not has_teacher_rows(batch):
            return
        if batch_idx == 0 or not is_queued(batch["input_ids"].device):
            check_teacher_rows(batch, self.positions(batch))
        width = cast(PromptBatch, batch)["teacher"]["input_ids"].shape[1]
        self.check_teacher_length(width, "the rows of a batch")

    def check_told(self, batch: Batch) -> None:
        """Validate that the teacher can teach its student something.

        Raises:
            ValueError: If it is the student, and reads no more than it does; or if it is told more in
                tokens that it has not.
        """
        super().check_told(batch)
        if has_teacher_rows(batch):
            if any(teacher.has_own_tokens for teacher in self.teachers.values()):
                raise ValueError(
                    "the data tells the teacher more than the student (data.teacher_prompt_template, "
                    "or data.hint of ArithmeticData) in the student's tokens, and the teacher has "
                    "tokens of its own; leave it out, or give what the teacher reads as a column "
                    "teacher_prompt of data.extra_columns"
                )
            return
        for each in self.followers:
            alike = self.learns_from_its_start or each not in self_teachers(self.teacher)
            if isinstance(each, LiveStudent) or not alike:
                raise ValueError(
                    f"the teacher is {type(each).__name__}, and reads what the student reads, so that "
                    "there is nothing to learn from it. Give data.teacher_prompt_template, with a "
                    "column that tells the teacher more (PromptCompletionData, ChatData; data.hint of "
                    "ArithmeticData), or another teacher"
                )

    def check_lengths(self, *, rewritten: bool) -> None:
        """Validate that rows fit the positions of the models, also as the teacher reads them.

        Raises:
            ValueError: If they do not.
        """
        super().check_lengths(rewritten=rewritten)
        for split, (row, _) in longest_of_teacher(self.trainer).items():
            if split != "train" or not rewritten:
                self.check_teacher_length(row, f"{split} rows")

    def check_teacher_length(self, length: int, what: str) -> None:
        """Validate that rows fit the positions of the teacher.

        Raises:
            ValueError: If they do not.
        """
        for teacher in self.teachers.values():
            check_length(teacher.local_models, length, f"{what}, as the teacher reads them,")

    # The steps that it follows.

    @property
    def follows_steps(self) -> bool:
        """Whether something moves on with each optimizer step that is taken."""
        return bool(self.followers)

    def after_step(self, step: int) -> None:
        """Move on with an optimizer step that was taken, counted from 0."""
        for each in self.followers:
            each.after_step()

    def begin_step(self) -> None:
        """Note that an optimizer step is about to be taken."""
        if self.follows_steps:
            self._step_begun = self.trainer.global_step, self._loss_scale()

    def follow_step(self) -> None:
        """Move on with the last step, once, if it was taken."""
        if self._step_begun is None or self.trainer.global_step == self._step_begun[0]:
            return
        (step, scale), self._step_begun = self._step_begun, None
        # A gradient scaler lowers its scale where it skips a step.
        if self._loss_scale() >= scale and self._has_stepped():
            self.after_step(step)

    def _has_stepped(self) -> bool:
        adapter = self._adapter
        if adapter.scales_loss_before_backward:
            return not adapter.skipped_last_step()
        # Whoever else skips a step, as NonFiniteGuard does, takes the gradients away.
        has_gradients = any(p.grad is not None for p in self.student.parameters())
        if adapter.flattens_weights:
            # A process may hold nothing of what is trained.
            return any_process(has_gradients, self.device)
        return has_gradients

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the weights of teachers that follow the student."""
        super().on_save_checkpoint(checkpoint)
        self.follow_step()  # a callback may save before ours has heard of the step
        wanted = self.trainer.is_global_zero
        states = [each.state(wanted=wanted) for each in self.followers]
        if states:
            checkpoint[_KINDS] = self._kinds
        if any(states):
            checkpoint[_STATES] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the weights of teachers that follow the student.

        Raises:
            ValueError: If they are another student's, or those of other teachers.
        """
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get(_KINDS, [])
        copied = any(isinstance(each, CopyOfStudent) for each in self.followers)
        if not copied or not self.loads_teacher:
            return
        # An evaluation may ask fewer than the run, which come first.
        if found[: len(self._kinds)] != self._kinds:
            raise ValueError(
                f"model.teacher and what else is asked here are copies of the student "
                f"({', '.join(self._kinds)}), and the checkpoint has those of "
                f"{', '.join(found) or 'none that it names'}; give model.teacher, and "
                "model.reference, as the run of the checkpoint had them, or begin a new run from its "
                "student: lightning-kd export, and that directory as model.student.name_or_path"
            )
        states = checkpoint.get(_STATES, [{} for _ in found])
        for each, state in zip(self.followers, states, strict=False):
            if state:
                each.load_state(state)

    @property
    def _kinds(self) -> list[str]:
        return [type(each).__name__ for each in self.followers]


def check_strategy(trainer: L.Trainer, teachers: Iterable[Teacher]) -> None:
    """Refuse a strategy under which a student cannot be its own teacher.

    Raises:
        ValueError: If the strategy is neither one process, ddp nor fsdp2; or if it is fsdp2, and the
            student teaches some of the rows.
    """
    adapter = adapter_of(trainer)
    for teacher in teachers:
        following = self_teachers(teacher)
        if following and (adapter.flattens_weights or adapter.scales_loss_before_backward):
            raise ValueError(
                f"{type(following[0]).__name__} has its weights from the student, and under "
                f"{type(trainer.strategy).__name__} no process has them as they are; use one process, "
                "--trainer.strategy ddp or fsdp2"
            )
        routed = [t for t in with_members(teacher) if isinstance(t, RoutedTeacher)]
        of_rows = [each for some in routed for each in self_teachers(some)]
        if of_rows and adapter.shards_weights:
            raise ValueError(
                f"{type(of_rows[0]).__name__} is a member of a RoutedTeacher, and has its weights in "
                f"shards under {type(trainer.strategy).__name__}: it answers on all processes "
                "together, but each process asks the teachers of its own rows. Use one process or "
                "--trainer.strategy ddp"
            )


def longest_of_teacher(trainer: L.Trainer) -> dict[str, tuple[int, int]]:
    """Return the tokens of the longest row and prompt that a teacher reads in another form."""
    longest = getattr(getattr(trainer, "datamodule", None), "longest_of_teacher", None)
    return {} if longest is None else longest()


class _StepFollower(Callback):
    """Tells a module when an optimizer step begins, and when it has ended."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, SelfTaughtModule)  # it has brought this callback
        pl_module.begin_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        assert isinstance(pl_module, SelfTaughtModule)  # it has brought this callback
        pl_module.follow_step()
