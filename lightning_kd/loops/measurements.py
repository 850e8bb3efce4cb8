"""Which metrics the last validation has measured: what decides by another one waits."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Measurements(Callback):
    """Note what each validation measures, in front of all callbacks that decide by it.

    Lightning keeps a value until the next one: what evaluates in some validations only, as BLiMP may,
    would have other validations, and the weights that they are of, judged by a value of earlier ones.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self._before: dict[str, Tensor] = {}

    def restore(self, names: Iterable[str]) -> None:
        """Go on where these metrics have just been measured."""
        self.names = frozenset(names)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Forget what was measured: the weights are others after this batch."""
        self.names = frozenset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the values of before, to know the new ones from."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note whose value is another object than before: Lightning computes each anew."""
        now = trainer.callback_metrics.items()
        self.names = frozenset(n for n, value in now if self._before.get(n) is not value)
        self._before = {}


def measurements_of(trainer: L.Trainer) -> Measurements | None:
    """Return what notes the measurements of a trainer; None if nothing does, as in a search."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, Measurements)), None)


def is_measured(trainer: L.Trainer, monitor: str | None) -> bool:
    """Return whether a metric may be decided by: if it is of validation, the last one measured it."""
    found = measurements_of(trainer)
    if found is None or monitor is None or not monitor.startswith("val/"):
        return True
    return monitor in found.names
