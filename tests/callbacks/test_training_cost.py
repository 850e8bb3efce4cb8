"""What training has cost, in time that a test lets pass."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_kd.callbacks import TrainingCost, training_cost

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Clock:
    """A clock that goes on when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Timed(BoringModel):
    """Takes a second for a training step and a hundred for a validation."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 1
        self.log("train/tokens", 5.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 100
        return super().validation_step(batch, batch_idx)


def test_costs_go_on_from_a_checkpoint_and_training_is_counted_without_validation(
    tmp_path, monkeypatch
):
    clock = Clock()
    monkeypatch.setattr(training_cost, "time", clock)

    def costs(steps, checkpoint=None):
        counting = TrainingCost()
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[counting, saving],
            val_check_interval=2,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Timed(clock), ckpt_path=checkpoint, weights_only=True)
        return counting.totals

    whole = {"steps": 4, "tokens": 20, "generated_tokens": 0, "seconds": 4, "wall_seconds": 204}
    assert costs(4) == whole
    clock.now += 1000  # between an end and the next start
    (saved,) = tmp_path.glob("*step=3.ckpt")
    assert torch.load(saved, weights_only=True)["training_cost"]["wall_seconds"] == 103
    more = {"steps": 6, "tokens": 30, "generated_tokens": 0, "seconds": 6, "wall_seconds": 306}
    assert costs(6, saved) == more
