"""Teachers outside of a process: they fail on all processes of a run or on none, and look ahead."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import lightning as L
import torch

from lightning_kd.batch import Batch
from lightning_kd.collectives import any_process, gather_objects
from lightning_kd.modules.student_module import generates_completions
from lightning_kd.teachers import TeacherUnavailableError

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
