"""What training has cost."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.callbacks.on_policy_generation import OnPolicyGeneration

_CHECKPOINT_KEY = "training_cost"


class TrainingCost(Callback):
    """Count what training costs: tokens, generated tokens and seconds.

    ``totals`` has ``steps`` (optimizer steps), ``tokens`` (scored tokens, as ``train/tokens``),
    ``generated_tokens`` (written by student or teacher, for all ranks), ``seconds`` (of training with
    generation) and ``wall_seconds`` (with validation too). Logs ``train/seconds``, at logged steps and
    validations. A resumed run goes on counting from its checkpoint. Numbers are complete when training
    has ended.

    Example:
        >>> TrainingCost().totals["tokens"]
        0.0
    """

    def __init__(self) -> None:
        names = ("steps", "tokens", "generated_tokens", "seconds", "wall_seconds")
        self.totals = dict.fromkeys(names, 0.0)
        self._generated = 0
        self._step = 0
        self._started: float | None = None
        self._validating = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._step = trainer.global_step
        self._generated = _generated(trainer)
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count no validation as training."""
        if self._started is not None:
            self._count_time()
            self._validating = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log when a validation began, so that its numbers can be shown over time."""
        if self._validating:
            pl_module.log("train/seconds", self.totals["seconds"], sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count training again."""
        if self._validating:
            self._count_time()
            self._validating = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Count an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.totals["steps"] = float(self._step)
        tokens = trainer.callback_metrics.get("train/tokens")
        if tokens is not None:
            self.totals["tokens"] += float(tokens)
        self._count_time()
        pl_module.log("train/seconds", self.totals["seconds"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the counts; all ranks come here together."""
        if self._started is not None:
            self._count_time()
            self._count_generated(trainer)
        checkpoint[_CHECKPOINT_KEY] = dict(self.totals)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on counting."""
        if trainer.state.fn is TrainerFn.FITTING:
            self.totals |= checkpoint.get(_CHECKPOINT_KEY, {})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the counts."""
        self._count_time()
        self._count_generated(trainer)
        self._started = None

    def _count_time(self) -> None:
        assert self._started is not None  # only after on_train_start
        now = time.perf_counter()
        passed, self._started = now - self._started, now
        self.totals["wall_seconds"] += passed
        if not self._validating:
            self.totals["seconds"] += passed

    def _count_generated(self, trainer: L.Trainer) -> None:
        """Add what all ranks have generated since the last time."""
        own = _generated(trainer)
        new = torch.tensor(own - self._generated, device=trainer.strategy.root_device)
        self._generated = own
        self.totals["generated_tokens"] += float(trainer.strategy.reduce(new, reduce_op="sum"))


def _generated(trainer: L.Trainer) -> int:
    """Return the tokens that this process has generated."""
    writing = [c for c in trainer.callbacks if isinstance(c, OnPolicyGeneration)]  # type: ignore[attr-defined]
    return sum(callback.statistics.generated_tokens for callback in writing)
