"""Teachers outside of a process: they fail on all processes of a run or on none, and look ahead."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.batch import Batch
from lightning_kd.collectives import any_process, gather_objects
from lightning_kd.modules.student_module import generates_completions
from lightning_kd.teachers import Teacher, TeacherUnavailableError

_T = TypeVar("_T")


@runtime_checkable
class ForesightedLoader(Protocol):
    """Loader that knows the micro-batch that comes next."""

    def following(self) -> Batch | None:
        """Return it; None where there is none."""
        ...


def following_batch(trainer: L.Trainer) -> Batch | None:
    """Return the micro-batch that a run trains on next.

    Args:
        trainer: Of the run.

    Returns:
        None where it is not known: at the end of an epoch, with another loader, and where completions
        are generated, for rollouts tell by themselves.
    """
    loader = trainer.train_dataloader
    if generates_completions(trainer) or not isinstance(loader, ForesightedLoader):
        return None
    return loader.following()


class LookingAhead(Callback):
    """Tells a teacher that looks ahead which micro-batch comes next, and when a run is over."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Look ahead in the data; what callbacks generate they tell by themselves."""
        module = cast(_Taught, pl_module)
        if module.teacher.looks_ahead and not generates_completions(trainer):
            module.coming = following_batch(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of what comes: nothing does."""
        module = cast(_Taught, pl_module)
        module.coming = None
        module.teacher.forget()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let go of what comes: nothing does."""
        self.on_fit_end(trainer, pl_module)


class _Taught(Protocol):
    teacher: Teacher
    coming: Batch | None


def ask_together(ask: Callable[[], _T], device: torch.device) -> _T:
    """Return what a teacher answers this process, if it answers all of them.

    Otherwise the others would wait for the gradient of the one that has none, and none could save.

    Args:
        ask: Asks the teacher of this process; called by all processes at once.
        device: Of collectives.

    Raises:
        TeacherUnavailableError: On every process, if the teacher of one has failed.
    """
    answers: list[_T] = []
    failure: TeacherUnavailableError | None = None
    try:
        answers.append(ask())
    except TeacherUnavailableError as error:
        failure = error
    if not any_process(failure is not None, device):
        return answers[0]
    reasons = gather_objects(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    listed = [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    raise TeacherUnavailableError(f"the teacher of another process has failed; {listed[0]}")
