"""What a callback does alike in validations and in the test."""

from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_kd.batch import Batch

Stage = Literal["val", "test"]
"""Prefix of the names under which an evaluation logs."""

SPLITS: dict[Stage, Literal["validation", "test"]] = {"val": "validation", "test": "test"}
"""The rows of each."""


class EvaluationCallback(Callback):
    """Take part in every validation and in the test; a callback writes what it needs of these."""

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Validate what can be known before a run's first step, or before it evaluates.

        Raises:
            ValueError: If something cannot be evaluated.
        """

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget what an evaluation before this one has left."""

    def add(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add a batch that the module has evaluated."""

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Log, on all processes together, what the batches have come to."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate what validations need; see :meth:`check`."""
        self.check(trainer, pl_module, "val")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a validation; a run that only validates is checked here."""
        if trainer.state.fn == "validate":
            self.check(trainer, pl_module, "val")
        self.begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the test."""
        self.check(trainer, pl_module, "test")
        self.begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        self.add(trainer, pl_module, batch, batch_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        self.add(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a validation."""
        self.end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the test."""
        self.end(trainer, pl_module, "test")
