"""What a cluster does to a run: it takes the machine back, fills the disk, loses a process."""

import json
import os
import resource
import shutil
import signal
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.resume.kill_runs import (
    Recorder,
    arguments,
    differences,
    finish,
    models,
    records,
    start,
    uninterrupted,
)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruptions")
    models(folder)
    return folder


@pytest.fixture(scope="module")
def reference(root):
    """The run of a strategy that nobody interrupts, made once."""
    return cache(partial(uninterrupted, "supervised_kd", setting="plain", root=root))


@pytest.mark.parametrize(
    ("strategy", "rank", "number"),
    [
        ("one", 0, signal.SIGTERM),
        ("ddp", 1, signal.SIGTERM),
        ("fsdp2", 0, signal.SIGTERM),
        ("one", 0, signal.SIGINT),
        ("ddp", 0, signal.SIGINT),
        ("one", 0, signal.SIGHUP),
        ("ddp", 1, signal.SIGHUP),
    ],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bit_for_bit(
    root, reference, strategy, rank, number
):
    world = 1 if strategy == "one" else 2
    expected = reference(strategy)
    folder = root / f"terminated_{strategy}_{number}"
    argv = arguments("supervised_kd", strategy, folder)
    processes = start(argv, world)
    while len(records(folder, world)) < 9 * world:
        time.sleep(0.002)
    os.kill(processes[rank].pid, number)
    for process in processes:
        process.join(60)
        assert process.exitcode == 128 + number, (folder / "log_0.txt").read_text()[-2000:]
    said = (folder / "log_0.txt").read_text()
    assert "continue with --ckpt_path" in said
    assert "Traceback" not in said
    steps = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    # Not only the checkpoint of every third step: the one that had just ended.
    assert steps == max(line["position"] for line in records(folder, world)) // 2
    argv[-2:-2] = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    finish(start(argv, world), folder / "log_0.txt")
    assert differences(expected, folder, world) == []


def get_stuck():
    record = Recorder.on_train_batch_end

    def recorded(self, trainer, *rest):
        record(self, trainer, *rest)
        if trainer.global_step == 1:
            time.sleep(60)

    Recorder.on_train_batch_end = recorded


def test_a_second_ctrl_c_ends_a_process_that_is_stuck_in_a_step(root):
    folder = root / "stuck"
    (process,) = start(arguments("supervised_kd", "one", folder), 1, get_stuck)
    while len(records(folder, 1)) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()  # it is to finish its step
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT


def delete(*, name):
    record = Recorder.on_train_batch_end

    def recorded(self, trainer, *rest):
        record(self, trainer, *rest)
        if trainer.train_dataloader.position == 9:
            shutil.rmtree(self.path.parent / name)

    Recorder.on_train_batch_end = recorded


def test_checkpoints_that_are_deleted_underneath_are_missed_by_nobody(root, reference):
    folder = root / "deleted"
    argv = arguments("supervised_kd", "one", folder)
    (process,) = start(argv, 1, partial(delete, name="checkpoints"))
    process.join(120)
    assert process.exitcode == 0, (folder / "log_0.txt").read_text()[-2000:]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    assert differences(reference("one"), folder, 1) == []


def test_logs_that_are_deleted_underneath_end_the_run_in_a_line(root):
    folder = root / "unlogged"
    argv = arguments("supervised_kd", "one", folder)
    (process,) = start(argv, 1, partial(delete, name="runs"))
    process.join(120)
    said = (folder / "log_0.txt").read_text()
    assert process.exitcode == 2, said[-2000:]
    assert "lightning-kd: error: [Errno 2] No such file or directory" in said
    assert "events.out" in said.split("lightning-kd: error:")[1]
    assert (folder / "checkpoints" / "last.ckpt").exists()


def fill_the_disk_after_the_first_checkpoint():
    replace = Path.replace

    def replaced(self, target):
        done = replace(self, target)
        if self.name.endswith("last.ckpt.fresh"):
            limit = Path(target).stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return done

    Path.replace = replaced


def test_a_full_disk_ends_the_run_with_the_checkpoint_before_intact(root):
    """A limit on the size of a file stands in for a disk without room."""
    folder = root / "full"
    argv = arguments("supervised_kd", "one", folder)
    (process,) = start(argv, 1, fill_the_disk_after_the_first_checkpoint)
    process.join(120)
    said = (folder / "log_0.txt").read_text()
    assert process.exitcode == 2, said[-2000:]
    assert "could not be written" in said
    assert "File too large" in said
    assert "Traceback" not in said
    last = folder / "checkpoints" / "last.ckpt"
    assert str(last) in said
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert not list(last.parent.glob("*.fresh"))


def get_lost():
    record = Recorder.on_train_batch_end

    def recorded(self, trainer, *rest):
        record(self, trainer, *rest)
        if trainer.global_rank == 1 and trainer.global_step == 2:
            time.sleep(60)

    Recorder.on_train_batch_end = recorded


def test_a_process_that_is_lost_is_named_by_step_and_phase(root):
    folder = root / "lost"
    argv = arguments("supervised_kd", "ddp", folder)
    overlay = yaml.safe_load((folder / "overlay.yaml").read_text())
    overlay["trainer"]["strategy"] = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"timeout": "0:00:05"},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))

    processes = start(argv, 2, get_lost)
    processes[0].join(90)
    said = (folder / "log_0.txt").read_text()
    for process in processes:
        process.kill()
        process.join()
    assert processes[0].exitcode not in {0, None}
    assert "waited for the others in optimizer step 3" in said, said[-3000:]
    assert "while" in said.split("waited for the others")[1]


def poison_one_rank():
    def poisoned(self, trainer, pl_module):
        if trainer.global_rank == 1 and trainer.train_dataloader.position == 4:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).fill_(float("nan"))

    Recorder.on_after_backward = poisoned


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_on_all(root, strategy):
    folder = root / f"poisoned_{strategy}"
    argv = arguments("supervised_kd", strategy, folder)
    argv[-2:-2] = ["--non_finite.action", "skip", "--non_finite.dirpath", str(folder / "bad")]
    finish(start(argv, 2, poison_one_rank), folder / "log_0.txt")
    saved = {path.name for path in (folder / "bad").iterdir()}
    batches = [f"step2_rank{rank}_batch{number}" for rank in (0, 1) for number in (0, 1)]
    assert saved == {f"{name}.safetensors" for name in batches}
    ends = [json.loads((folder / f"record_{rank}.end").read_text()) for rank in (0, 1)]
    assert ends[0]["weights"] == ends[1]["weights"]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["callbacks"]["NonFiniteGuard"] == {"skipped": 1}
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())
