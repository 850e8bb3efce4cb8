"""Saves that signals ask for: after the optimizer step, and behind all that belongs to it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose


class SavesAfterStep(Callback):
    """A callback that saves in ``on_train_batch_end``.

    It is called behind all others but ``ModelCheckpoint``: what they do after a step, such as averaging
    its weights, belongs into the checkpoint, and is not done again by the run that goes on from it.
    """


class RequeueAfterStep(SavesAfterStep):
    """Delay Lightning's requeueing of a SLURM job until the end of the optimizer step.

    Lightning saves within the signal handler, wherever training is: inside a step a gradient would be
    lost, and processes may be at different places. One that gets the signal is enough.
    """

    def __init__(self) -> None:
        self._asked = False
        self._steps = 0
        self._requeue: Callable[..., Any] | None = None
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signal, unless the user has a handler for it."""
        self._asked, self._steps, self._requeue = False, trainer.global_step, None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(_requeue_signal(trainer))
            if isinstance(handler, _HandlersCompose):
                self._requeue = handler
                self._before = handler_before(trainer, _requeue_signal(trainer))
                signal.signal(_requeue_signal(trainer), self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Save and requeue, if an optimizer step has ended and any process has got the signal.

        The run goes on until SLURM ends it.
        """
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = False
            if self._requeue is not None:
                self._requeue(_requeue_signal(trainer), None)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the signal's handler."""
        if self._requeue is not None:
            signal.signal(_requeue_signal(trainer), self._before)
            self._requeue = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def handler_before(trainer: L.Trainer, number: signal.Signals) -> Any:
    """Return a signal's handler from before the trainer, which resets its own before callbacks do."""
    before = trainer._signal_connector._original_handlers.get(number)
    return signal.getsignal(number) if before is None else before


def requeues(trainer: L.Trainer) -> bool:
    """Return whether Lightning requeues this SLURM job at the end of its time."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def _requeue_signal(trainer: L.Trainer) -> signal.Signals:
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)  # or there would be no such callback
    return environment.requeue_signal or signal.SIGUSR1
