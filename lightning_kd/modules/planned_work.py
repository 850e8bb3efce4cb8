"""How many logits a run is going to evaluate, which decides whether code for them is worth making."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_kd.models import LogitsBackend, vocabulary_size
from lightning_kd.modules.counts import StepCountingModule
from lightning_kd.modules.loss import MicroBatchLoss


class PlanningModule(StepCountingModule):
    """A module whose logits backend hears how much it will have to do."""

    logits_backend: LogitsBackend
    """Runs the models, and evaluates token terms at scored positions."""

    micro_batch_loss: MicroBatchLoss

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that tells it."""
        return [*super().configure_callbacks(), _Planner()]

    def planned_logits(self) -> float:
        """Return how many logits of the student this rank evaluates until the end of the run.

        That is as many as in the last micro-batch, on the average of all ranks, times the
        micro-batches of the run; 0 where a run ends by time alone. All ranks call it together.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return 0.0
        positions = self.micro_batch_loss.positions.tokens_per_row.sum()[None].double()
        mean = self.sum_over_ranks(positions.to(self.device)).item() / self.trainer.world_size
        rows = mean * steps * self.trainer.accumulate_grad_batches
        return rows * vocabulary_size(self.student)


class _Planner(Callback):
    """Tells the logits backend the plan; in a resumed run that of the saved one, to decide alike."""

    def __init__(self) -> None:
        self._logits: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._logits = None

    def state_dict(self) -> dict[str, Any]:
        return {"planned_logits": self._logits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logits = state_dict["planned_logits"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PlanningModule)  # it has brought this callback
        pl_module.logits_backend.plan(self._logits or 0.0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        assert isinstance(pl_module, PlanningModule)  # it has brought this callback
        if self._logits is None:
            self._logits = pl_module.planned_logits()
            pl_module.logits_backend.plan(self._logits)
