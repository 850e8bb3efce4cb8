"""Callbacks that decide by a metric of validation: once for each value, by the weights it is of."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_kd.loops.fit import EpochLoop, checkpoint_callbacks, early_stoppings
from lightning_kd.loops.measurements import is_measured


class SavesAfterValidation(ModelCheckpoint):
    """A checkpoint callback that ranks by a metric of validation, and saves only after one that has it.

    Lightning saves before the validation of the same step, and at the end of an epoch that
    ``max_steps`` has cut short: the weights there would be ranked by the metric of earlier ones.
    """

    _trained = False
    """Whether this step was trained and is not validated yet."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Delay a save that is due until after the validation of this step."""
        loop = trainer.fit_loop.epoch_loop
        if isinstance(loop, EpochLoop) and loop.in_step:
            return
        self._trained = True
        try:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        finally:
            self._trained = False

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Return the metrics; before a validation Lightning waits for one that is missing."""
        found = super()._monitor_candidates(trainer)
        if self._trained:
            found.pop(str(self.monitor), None)
        return found

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        """Return whether there is nothing to decide by; a save that is due waits."""
        if not self._trained and not is_measured(trainer, self.monitor):
            return True
        return super()._should_skip_saving_checkpoint(trainer)

    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        if trainer.enable_validation:
            return False
        return super()._should_save_on_train_epoch_end(trainer)


class StopsAfterValidation(EarlyStopping):
    """An ``EarlyStopping`` that counts only validations which have measured what it watches."""

    def _should_skip_check(self, trainer: L.Trainer) -> bool:
        return super()._should_skip_check(trainer) or not is_measured(trainer, self.monitor)


def ranks_by_validation(callback: ModelCheckpoint) -> bool:
    """Return whether a callback keeps the best checkpoints by a metric of validation."""
    return (callback.monitor or "").startswith("val/") and callback.save_top_k != 0


def decide_after_validation(trainer: L.Trainer) -> None:
    """Make callbacks that decide by a metric of validation do so after each validation, and only then.

    They become callbacks of this package where they stand, under the names of their classes, which
    are those of their states in checkpoints.
    """
    for callback in checkpoint_callbacks(trainer):
        if ranks_by_validation(callback):
            _become(callback, SavesAfterValidation)
    for stopping in early_stoppings(trainer):
        if stopping.monitor.startswith("val/"):
            _become(stopping, StopsAfterValidation)
            if stopping._check_on_train_epoch_end is None:
                stopping._check_on_train_epoch_end = False


def _become(callback: Callback, kind: type[Callback]) -> None:
    own = type(callback)
    if not issubclass(own, kind):
        # Of one path with the class, so that its name alone still means one in a later command line.
        names = {"__qualname__": own.__qualname__, "__module__": _home(own)}
        callback.__class__ = type(own.__name__, (kind, own), names)


def _home(cls: type) -> str:
    """Return the first package, from the top, that a class can be imported from."""
    parts = cls.__module__.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    found = (p for p in above if getattr(sys.modules.get(p), cls.__qualname__, None) is cls)
    return next(found, cls.__module__)
