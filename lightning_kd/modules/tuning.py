"""What Lightning's ``Tuner`` asks of a module: its learning rate, and the loss of a step."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import nn
from torch.optim import Optimizer


class TunableModule(L.LightningModule):
    """A module whose learning rate can be read and set.

    Example:
        >>> from lightning_kd import SFT
        >>> module = SFT(student="./student", optimizer=torch.optim.SGD)
        >>> module.lr
        0.001
        >>> module.lr = 0.5
        >>> module.lr
        0.5
    """

    _optimizer: OptimizerCallable
    _lr: float | None = None

    @property
    def lr(self) -> float:
        """Learning rate at which the optimizer starts: its own, or what it was set to."""
        if self._lr is None:
            return float(self._optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"])
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        """Set it, for all weights of optimizers that are still to be built."""
        self._lr = float(value)

    def at_own_rate(self, optimizer: Optimizer) -> Optimizer:
        """Return an optimizer, at the learning rate that was set, if one was."""
        if self._lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self._lr
        return optimizer

    def on_train_start(self) -> None:
        """Let a search for a learning rate see the loss of each step."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback) is _LRCallback:
                callback.__class__ = _StepLosses
        super().on_train_start()


class _StepLosses(_LRCallback):
    """Recorder of a search; a training step returns the sum of a micro-batch, which is no loss."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *where: Any
    ) -> None:
        """Record the mean that the step was taken on."""
        loss = trainer.callback_metrics.get("train/loss", torch.zeros(()))
        super().on_train_batch_end(trainer, pl_module, {"loss": loss}, *where)
