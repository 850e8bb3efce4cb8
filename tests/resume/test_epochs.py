"""Runs over epochs: what Lightning's options do, and that every checkpoint goes on exactly.

A run that is killed goes on from its last checkpoint, so that going on from each checkpoint of a run
that is not killed covers a kill anywhere.
"""

import shutil
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import SingleTeacher, Student
from lightning_kd.modules import GKD, SFT, SupervisedKD, WarmupCosine
from tests.modules.harness import Letters, trainer
from tests.toys import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Events(Callback):
    """What happens in a run, in order."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(("begin", trainer.current_epoch, trainer.num_training_batches))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rows = batch["row"].tolist()
        loss = outputs["loss"].item().hex()
        tokens = hash(tuple(batch["input_ids"].flatten().tolist()))
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.seen.append(("batch", trainer.current_epoch, batch_idx, rows, tokens, loss, last))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            loss = trainer.callback_metrics["val/loss"].item().hex()
            self.seen.append(("validation", trainer.global_step, loss))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("end", trainer.current_epoch, trainer.global_step))


class Ending(Callback):
    """The state of all callbacks and the weights when a run ends."""

    def on_train_end(self, trainer, pl_module):
        stopping = [c.state_dict() for c in trainer.callbacks if isinstance(c, EarlyStopping)]
        saving = []
        for callback in trainer.checkpoint_callbacks:
            state = callback.state_dict()
            for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
                state[name] = Path(state[name]).name
            state["best_k_models"] = {Path(k).name: v for k, v in state["best_k_models"].items()}
            saving.append(state | {"dirpath": None})
        self.state = stopping, saving, trainer.current_epoch, trainer.global_step
        self.weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])


class Logged(L.pytorch.loggers.logger.DummyLogger):
    """Rows of a log by step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        clock = {"train/tokens_per_second", "rollout/tokens_per_second", "rollout/time_share"}
        self.rows.append((step, {k: v for k, v in metrics.items() if k not in clock}))


def saves_everything(folder):
    """One that saves after steps, one after epochs, one the best, and a last of each."""
    common = {"dirpath": folder, "save_top_k": -1, "filename": None}
    return [
        ModelCheckpoint(**common | {"filename": "s{step}"}, every_n_train_steps=1),
        ModelCheckpoint(**common | {"filename": "e{epoch}-{step}"}, every_n_epochs=1),
        ModelCheckpoint(
            **common | {"filename": "b{step}", "save_top_k": 2},
            monitor="val/loss",
            save_on_train_epoch_end=False,
        ),
    ]


def plain(**settings):
    return SFT(
        student=Student.of(tiny_llama(0, attention_dropout=0.1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2),
        lr_scheduler=lambda o: WarmupCosine(o, 2),
        **settings,
    )


def distilled():
    return SupervisedKD(
        student=Student.of(tiny_llama(0, attention_dropout=0.1)),
        teacher=SingleTeacher.of(tiny_llama(1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )


def on_policy(cls=GKD):
    return cls(
        student=Student.of(tiny_llama(0)),
        teacher=SingleTeacher.of(tiny_llama(1)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )


def rollouts(**settings):
    return OnPolicyGeneration(
        **({"generation": SamplingOptions(max_new_tokens=4), "table_every": 0} | settings)
    )


def run(
    module,
    folder=None,
    *,
    callbacks=(),
    data=None,
    ckpt_path=None,
    events=None,
    log=None,
    **settings,
):
    """Fit, and return the trainer and what happened: events, ending, log."""
    events, ending, log = events or Events(), Ending(), log or Logged()
    listed = [*callbacks, events, ending]
    if folder is not None:
        settings["enable_checkpointing"] = True
        listed += saves_everything(folder)
    fit = trainer(
        callbacks=listed, logger=log, **({"limit_val_batches": 1.0, "max_epochs": 3} | settings)
    )
    data = data or Letters(rows=10, batch_size=2)
    fit.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return fit, events.seen, ending, log.rows


class Snapshots(TorchCheckpointIO):
    """A copy of the directory as it is after each checkpoint, and how much had happened by then."""

    def __init__(self, folder, kept):
        super().__init__()
        self.folder, self.kept, self.taken = folder, kept, []
        self.seen, self.rows = [], []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        copy = self.kept / str(len(self.taken))
        shutil.copytree(self.folder, copy)
        self.taken.append((copy, Path(path), len(self.seen), len(self.rows)))


def goes_on_from_every_checkpoint(module, root, *, callbacks=list, data=Letters, **settings):
    """Run once, then from each checkpoint with the directory as it was; return the first run."""
    folder, kept = root / "run", root / "kept"
    if data is Letters:
        data = partial(Letters, rows=10, batch_size=2)
    folder.mkdir()
    snapshots = Snapshots(str(folder), kept)
    events, log = Events(), Logged()
    snapshots.seen, snapshots.rows = events.seen, log.rows
    whole = run(
        module(),
        folder,
        callbacks=callbacks(),
        data=data(),
        events=events,
        log=log,
        plugins=[snapshots],
        **settings,
    )
    for copy, path, seen, rows in snapshots.taken:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        again = run(
            module(), folder, callbacks=callbacks(), data=data(), ckpt_path=path, **settings
        )
        name = f"{copy.name}: {path.name}"
        assert again[1] == whole[1][seen:], name
        assert again[3] == whole[3][rows:], name
        assert torch.equal(again[2].weights, whole[2].weights), name
        assert again[2].state == whole[2].state, name
    return whole, len(snapshots.taken)


def test_every_checkpoint_of_three_epochs_goes_on_exactly(tmp_path):
    (_, seen, _, _), count = goes_on_from_every_checkpoint(
        plain,
        tmp_path,
        accumulate_grad_batches=2,
        callbacks=lambda: [EarlyStopping("val/loss", patience=5)],
    )
    assert [e for e in seen if e[0] == "validation"][-1][1] == 8
    assert count == 8 + 3 + 3
