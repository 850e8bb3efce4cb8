"""What a callback does alike in validations and in the test."""

from collections.abc import Collection, Mapping
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.modules import DistillationModule
from lightning_kd.modules.evaluated_names import evaluated_names

Stage = Literal["val", "test"]
"""Prefix of the names under which an evaluation logs."""

SPLITS: dict[Stage, Literal["validation", "test"]] = {"val": "validation", "test": "test"}
"""The rows of each."""


class EvaluationCallback(Callback):
    """Take part in every validation and in the test; a callback writes what it needs of these."""

    @property
    def needs_validation(self) -> bool:
        """Whether a fit without validation would leave it without effect."""
        return True

    def names(self) -> Collection[str]:
        """Return the names, without ``val/``, that are known to be logged before anything runs."""
        return ()

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

    def log_values(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        stage: Stage,
        values: Mapping[str, Tensor | float],
        *,
        prog_bar: bool = False,
    ) -> None:
        """Log numbers of all processes by their names.

        Raises:
            ValueError: If the module or another callback logs one of the names.
        """
        self._check_names(trainer, module, stage, values)
        for name, value in values.items():
            on_device = value.to(module.device) if isinstance(value, Tensor) else value
            module.log(f"{stage}/{name}", on_device, prog_bar=prog_bar, sync_dist=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate what validations need; see :meth:`check`.

        Raises:
            ValueError: If there will be no validation, or two would log one name.
        """
        if self.needs_validation and not trainer.enable_validation:
            raise ValueError(
                f"{type(self).__name__} evaluates in validations, and this fit has none: give "
                "data.validation, with trainer.limit_val_batches above 0, or leave the callback out of "
                "the fit and give it to the test (lightning-kd test)"
            )
        self._check(trainer, pl_module, "val")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a validation; a run that only validates is checked here."""
        if trainer.state.fn == "validate":
            self._check(trainer, pl_module, "val")
        self.begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the test."""
        self._check(trainer, pl_module, "test")
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

    def _check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        self._check_names(trainer, module, stage, self.names())
        self.check(trainer, module, stage)

    def _check_names(
        self, trainer: L.Trainer, module: L.LightningModule, stage: Stage, names: Collection[str]
    ) -> None:
        """Refuse names that are another's: Lightning would log the mean of the two."""
        own = evaluated_names(module) if isinstance(module, DistillationModule) else ()
        taken = dict.fromkeys(own, type(module).__name__)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, EvaluationCallback) and other is not self:
                taken |= dict.fromkeys(other.names(), type(other).__name__)
        for name in names:
            if name in taken:
                raise ValueError(
                    f"{type(self).__name__} and {taken[name]} would both log {stage}/{name}, and "
                    "Lightning the mean of the two; give it another name, or leave one of the two out "
                    "and evaluate it in a run of its own (lightning-kd validate, lightning-kd test)"
                )
