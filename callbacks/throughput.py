"""Logging of tokens per second."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_kd.devices import is_queued
from lightning_kd.loops.progress import show


class TokensPerSecond(Callback):
    """Log ``train/tokens_per_second``: scored tokens of optimizer steps over their wall time.

    The time runs from the start of a step's first micro-batch to the end of its last, so neither
    validation nor waiting for data counts. On the CPU each step has a rate of its own; on an
    accelerator, where the host would wait for each, one that is logged has that of all steps since the
    one that was logged before. Works with any module that logs ``train/tokens``.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0
        self._tokens: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing at the first micro-batch of a step."""
        if self._started is None:
            self._started, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add an optimizer step, and log where the host may look."""
        tokens = trainer.callback_metrics.get("train/tokens")
        if self._started is None or trainer.global_step == self._step or tokens is None:
            return
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        looks = not is_queued(tokens.device) or (every > 0 and trainer.global_step % every == 0)
        read = float(self._tokens) if looks else 0.0  # before the clock: it waits for the steps
        self._seconds += time.perf_counter() - self._started
        self._started = None
        if looks:
            rate = read / self._seconds
            pl_module.log("train/tokens_per_second", torch.tensor(rate))
            show(trainer, "train/tokens_per_second", rate)
            self._seconds, self._tokens = 0.0, None
