"""Three epochs from the command line, killed with SIGKILL in each and resumed each time."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.resume.kill_runs import Recorder, arguments, finish, models, records, start

pytestmark = pytest.mark.processes


def command(folder, world, resume=None):
    argv = arguments("supervised_kd", "one" if world == 1 else "ddp", folder)
    path = folder / "overlay.yaml"
    overlay = yaml.safe_load(path.read_text())
    overlay["data"]["init_args"] |= {"batch_size": 2, "train_size": 10 * world}
    settings = {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0}
    overlay["trainer"] |= settings | {"check_val_every_n_epoch": 1, "log_every_n_steps": 1}
    saving, recorder = overlay["trainer"]["callbacks"]
    saving["init_args"] = {"dirpath": str(folder / "checkpoints"), "save_top_k": -1}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stopping["init_args"] = {"monitor": "val/loss", "patience": 2, "min_delta": 100.0}
    overlay["trainer"]["callbacks"] = [saving, stopping, recorder]
    path.write_text(yaml.safe_dump(overlay))
    if resume is not None:
        argv[-2:-2] = ["--ckpt_path", str(resume)]
    return argv


def die(*, epoch, validating):
    """In the middle of an epoch's micro-batches, or of its validation."""

    def trained(self, trainer, pl_module, outputs, batch, batch_idx):
        record(self, trainer, pl_module, outputs, batch, batch_idx)
        if trainer.current_epoch == epoch and batch_idx == 2 and not validating:
            os.kill(os.getpid(), signal.SIGKILL)

    def validated(self, trainer, pl_module, *_):
        if trainer.current_epoch == epoch and validating and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)

    record = Recorder.on_train_batch_end
    Recorder.on_train_batch_end, Recorder.on_validation_batch_start = trained, validated


def newest(folder):
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def decisions(folder):
    """What early stopping has counted, and what was saved, at the end of each epoch."""
    seen = {}
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        saved = torch.load(path, weights_only=True)
        (stopping,) = (v for k, v in saved["callbacks"].items() if k.startswith("EarlyStopping"))
        (saving,) = (v for k, v in saved["callbacks"].items() if k.startswith("ModelCheckpoint"))
        place = saved["epoch"], saved["global_step"], Path(saving["best_model_path"]).name
        metrics = {k: v.item() for k, v in saved["lightning_kd_run"]["metrics"].items()}
        metrics.pop("train/tokens_per_second")
        weights = {k: v.tolist() for k, v in saved["state_dict"].items()}
        seen[path.name] = place, stopping["wait_count"], metrics, weights
    return seen


def by_position(folder, world):
    return {(line["rank"], line["position"]): line for line in records(folder, world)}


@pytest.mark.parametrize("world", [1, 2])
def test_three_epochs_that_are_killed_in_each_are_the_same(tmp_path, world):
    models(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finish(start(command(whole, world), world), whole / "log_0.txt")
    expected = decisions(whole)
    assert [entry[0][:2] for entry in expected.values()] == [(0, 3), (1, 5), (2, 8)]
    assert [entry[1] for entry in expected.values()] == [0, 1, 2]
    for epoch, validating in enumerate((False, True, False)):
        argv = command(folder, world, newest(folder))
        processes = start(argv, world, partial(die, epoch=epoch, validating=validating))
        for process in processes:
            process.join(120)
            assert process.exitcode == -signal.SIGKILL, (folder / "log_0.txt").read_text()[-2000:]
    assert len(decisions(folder)) == 2
    finish(start(command(folder, world, newest(folder)), world), folder / "log_0.txt")
    assert decisions(folder) == expected
    assert by_position(folder, world) == by_position(whole, world)
    assert (folder / "record_0.end").read_text() == (whole / "record_0.end").read_text()
