"""The batches of an optimizer step as the training step was given them."""

import functools
from typing import Any

import lightning as L

from lightning_kd.callbacks.audit.micro_batch_partitioning import fresh_copy


class BatchRecorder:
    """Keeps a copy of each batch that ``training_step`` is given.

    Only there are they complete: callbacks may still change a batch after ``on_train_batch_start``,
    and many a training step pops its labels.
    """

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._module: L.LightningModule | None = None
        self._own: Any = None

    def start(self, module: L.LightningModule) -> None:
        """Record the next training step."""
        self.stop()
        step = module.training_step
        self._module, self._own = module, module.__dict__.get("training_step")

        @functools.wraps(step)
        def recorded(batch: Any, *rest: Any, **named: Any) -> Any:
            self._batches.append(fresh_copy(batch))
            return step(batch, *rest, **named)

        module.__dict__["training_step"] = recorded

    def stop(self) -> None:
        """Leave the module as it was."""
        if self._module is not None:
            self._module.__dict__.pop("training_step", None)
            if self._own is not None:
                self._module.__dict__["training_step"] = self._own
            self._module = None

    def take(self) -> list[Any]:
        """Return what was recorded, and forget it."""
        taken, self._batches = self._batches, []
        return taken
