"""Checkpoint and clean exit when the cluster or the user terminates a run."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.collectives import max_over_processes
from lightning_kd.loops import (
    SavesAfterStep,
    TerminationSignals,
    at_last_step,
    has_trained,
    requeues,
)
from lightning_kd.teachers import TeacherUnavailableError


class SaveOnTermination(SavesAfterStep):
    """On SIGTERM, SIGHUP or Ctrl-C, finish the optimizer step, save ``last.ckpt``, and exit.

    Where the run ends because a teacher on a server has failed, ``last.ckpt`` is saved too, as of the
    last complete optimizer step.

    The exit code is the one that a shell reports for the signal: 143, 129 or 130. A second Ctrl-C
    ends the process immediately. It is enough if one process gets the signal: the others are told at
    the end of the step. If Lightning requeues SLURM jobs, it handles SIGTERM.

    Args:
        dirpath: Directory of ``last.ckpt``. Defaults to that of the run's ``ModelCheckpoint``, or else
            to ``checkpoints`` in the logger's directory.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._signals = TerminationSignals()
        self._steps = self._started_at = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove Lightning's handler of SIGTERM, since nothing has been trained yet."""
        _release_sigterm(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove Lightning's handler of SIGTERM in a run that only validates."""
        if trainer.state.fn is not TrainerFn.FITTING:
            _release_sigterm(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove Lightning's handler of SIGTERM in a test."""
        _release_sigterm(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove Lightning's handler of SIGTERM in a prediction."""
        _release_sigterm(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers.

        They replace Lightning's, which starts a collective inside the signal handler, even if another
        collective is in progress.
        """
        self._steps = self._started_at = trainer.global_step
        self._signals.listen(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Save and exit at the end of an optimizer step, if a signal was received."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        number = max_over_processes(self._signals.received, trainer.strategy.root_device)
        if number:
            directory = self._directory(trainer)
            trainer.save_checkpoint(directory / "last.ckpt", weights_only=False)
            rank_zero_info(
                f"Terminated after {self._steps} optimizer steps; continue with --ckpt_path "
                f"{directory / 'last.ckpt'}"
            )
            raise SystemExit(128 + number)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last optimizer step of a run whose teacher, outside of its processes, has failed.

        Such a failure comes on all processes together; any other may have left them at different
        places.
        """
        fitting = trainer.state.fn is TrainerFn.FITTING
        if not (
            fitting
            and isinstance(exception, TeacherUnavailableError)
            and has_trained(trainer, self._started_at)
        ):
            return
        path = self._directory(trainer) / "last.ckpt"
        with at_last_step(trainer) as possible:
            if possible:
                trainer.save_checkpoint(path, weights_only=False)
                exception.add_note(
                    f"{trainer.global_step} optimizer steps are saved; continue with --ckpt_path {path}"
                )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._signals.restore()

    def _directory(self, trainer: L.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        log_dir = trainer.log_dir  # on every rank: the trainer broadcasts it
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            return Path(checkpoint.dirpath)
        return Path(log_dir or trainer.default_root_dir) / "checkpoints"


def _release_sigterm(trainer: L.Trainer) -> None:
    """Restore the handler of SIGTERM from before the trainer's, which waits for other processes."""
    previous: Any = trainer._signal_connector._original_handlers.get(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    if previous is not None and main and not requeues(trainer):
        signal.signal(signal.SIGTERM, previous)
