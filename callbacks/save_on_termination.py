"""A checkpoint and a clean exit when the cluster wants the machine back."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.models.sharding import any_process

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell reports of a process that ended by this signal."""


class SaveOnTermination(Callback):
    """On SIGTERM, finish the optimizer step, save ``last.ckpt``, and exit with code 143.

    One process that gets the signal is enough: the others learn of it at the end of the step. Where
    Lightning requeues SLURM jobs, that is left to it. Give it behind callbacks whose state goes into
    checkpoints.

    Args:
        dirpath: Where to; the directory of the run's ``ModelCheckpoint`` when not given, or else
            ``checkpoints`` in the logger's directory.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._asked = False
        self._steps = 0
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for the signal.

        In place of Lightning's handler, which starts a collective inside the signal handler, whatever
        other one is under way.
        """
        environment = getattr(trainer.strategy, "cluster_environment", None)
        requeued = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if requeued or threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread listen
        self._asked, self._steps = False, trainer.global_step

        def handle(number: int, frame: FrameType | None) -> None:
            if not self._asked and trainer.strategy.launcher is not None:
                # Nobody but this process knows the ones that it has started.
                trainer.strategy.launcher.kill(number)
            self._asked = True

        self._before = signal.signal(signal.SIGTERM, handle)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Save and exit, where an optimizer step has ended and the signal has come."""
        if self._before is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if any_process(self._asked, trainer.strategy.root_device):
            directory = self._directory(trainer)
            trainer.save_checkpoint(directory / "last.ckpt", weights_only=False)
            rank_zero_info(
                f"Terminated after {self._steps} optimizer steps; go on with --ckpt_path "
                f"{directory / 'last.ckpt'}"
            )
            raise SystemExit(EXIT_CODE)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _directory(self, trainer: L.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        log_dir = trainer.log_dir  # asked on every rank: the trainer broadcasts its answer
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            return Path(checkpoint.dirpath)
        return Path(log_dir or trainer.default_root_dir) / "checkpoints"
