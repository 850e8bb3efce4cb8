"""The batches of an optimizer step as ``training_step`` received them."""

import functools
from contextlib import ExitStack
from typing import Any

import lightning as L

from lightning_kd.callbacks.audit.micro_batch_partitioning import clone_batch
from lightning_kd.callbacks.audit.replacements import replaced


class BatchRecorder:
    """Recorder of a copy of each batch that ``training_step`` receives.

    Batches are complete only there: callbacks may still change a batch after
    ``on_train_batch_start``, and many training steps pop its labels.
    """

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._replacement = ExitStack()

    def start(self, module: L.LightningModule) -> None:
        """Record the next training step."""
        self.stop()
        step = module.training_step

        @functools.wraps(step)
        def recorded(batch: Any, *rest: Any, **named: Any) -> Any:
            self._batches.append(clone_batch(batch))
            return step(batch, *rest, **named)

        self._replacement.enter_context(replaced(module, training_step=recorded))

    def stop(self) -> None:
        """Restore the module's ``training_step``."""
        self._replacement.close()

    def take(self) -> list[Any]:
        """Return and remove the recorded batches."""
        taken, self._batches = self._batches, []
        return taken
