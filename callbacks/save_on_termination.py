"""A checkpoint and a clean exit when the cluster or the user ends a run."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.collectives import max_over_processes
from lightning_kd.loops import SavesAfterStep, handler_before, requeues

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends a run after its optimizer step: the cluster, Ctrl-C, a terminal that is gone."""


class SaveOnTermination(SavesAfterStep):
    """On SIGTERM, SIGHUP or Ctrl-C, finish the optimizer step, save ``last.ckpt``, and exit.

    The exit code is what a shell reports of the signal: 143, 129 or 130. A second Ctrl-C ends the
    process at once. One process that gets the signal is enough: the others learn of it at the end of
    the step. Where Lightning requeues SLURM jobs, SIGTERM is left to it.

    Args:
        dirpath: Where to; the directory of the run's ``ModelCheckpoint`` when not given, or else
            ``checkpoints`` in the logger's directory.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._asked = 0
        self._steps = 0
        self._before: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take back Lightning's handler: nothing has been trained that could be saved."""
        _release_sigterm(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where nothing is trained."""
        if trainer.state.fn is not TrainerFn.FITTING:
            _release_sigterm(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same in a test."""
        _release_sigterm(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where completions are written."""
        _release_sigterm(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for the signals.

        In place of Lightning's handler, which starts a collective inside the signal handler, whatever
        other one is under way.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread listen
        self._asked, self._steps = 0, trainer.global_step

        def handle(number: int, frame: FrameType | None) -> None:
            self._asked = self._asked or number
            # Even where the process waits in code that Python cannot interrupt.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN  # as by nohup
            if not ignored and not (number == signal.SIGTERM and requeues(trainer)):
                self._before[number] = handler_before(trainer, number)
                signal.signal(number, handle)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Save and exit, where an optimizer step has ended and a signal has come."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        number = max_over_processes(self._asked, trainer.strategy.root_device)
        if number:
            directory = self._directory(trainer)
            trainer.save_checkpoint(directory / "last.ckpt", weights_only=False)
            rank_zero_info(
                f"Terminated after {self._steps} optimizer steps; go on with --ckpt_path "
                f"{directory / 'last.ckpt'}"
            )
            raise SystemExit(128 + number)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _directory(self, trainer: L.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        log_dir = trainer.log_dir  # asked on every rank: the trainer broadcasts its answer
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            return Path(checkpoint.dirpath)
        return Path(log_dir or trainer.default_root_dir) / "checkpoints"


def _release_sigterm(trainer: L.Trainer) -> None:
    """Let SIGTERM do what it did before the trainer; its handler would wait for the other processes."""
    before: Any = trainer._signal_connector._original_handlers.get(signal.SIGTERM)
    listens = threading.current_thread() is threading.main_thread()
    if before is not None and listens and not requeues(trainer):
        signal.signal(signal.SIGTERM, before)
