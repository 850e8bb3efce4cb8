"""Logging of tokens per second."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class TokensPerSecond(Callback):
    """Log ``train/tokens_per_second``: scored tokens of an optimizer step over its wall time.

    The time runs from the start of the step's first micro-batch to the end of its last, so neither
    validation nor waiting for data counts. Works with any module that logs ``train/tokens``.
    """

    def __init__(self) -> None:
        self._started: float | None = None

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
        """Log after an optimizer step."""
        tokens = trainer.callback_metrics.get("train/tokens")
        if self._started is None or trainer.global_step == self._step or tokens is None:
            return
        rate = float(tokens) / (time.perf_counter() - self._started)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True)
        self._started = None
