"""A checkpoint is no one's own: what one strategy has written, another one goes on from."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.resume.kill_runs import (
    arguments,
    differences,
    finish,
    models,
    outcome,
    records,
    start,
)

pytestmark = pytest.mark.processes

DIRECTORY = {"class_path": "FSDP2Strategy"}
DIRECTORY |= {"init_args": {"save_distributed_checkpoint": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("across")
    models(folder)
    return folder


def command(folder, strategy, devices, *, resume=None):
    """A run of 12 steps with 8 rows in each micro-batch, however many processes share them."""
    argv = arguments("supervised_kd", "one", folder)
    overlay = yaml.safe_load((folder / "overlay.yaml").read_text())
    overlay["trainer"] |= {"strategy": strategy, "devices": devices}
    overlay["trainer"]["callbacks"][0]["init_args"]["save_top_k"] = -1
    overlay["data"]["init_args"]["batch_size"] = 8 // devices
    # Dropout is drawn for a rank's own rows; without it the processes of a run do not show.
    overlay["model"]["init_args"]["student"]["config"]["attention_dropout"] = 0.0
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    if resume is not None:
        argv[-2:-2] = ["--ckpt_path", str(resume)]
    return argv


def step_six(folder):
    (found,) = (folder / "checkpoints").glob("*step=6.ckpt")
    return found


def student(folder):
    return load_file(folder / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def written(root):
    """Each strategy's checkpoint after 6 of 12 steps."""
    folders = {}
    for name, strategy, devices in (
        ("one", "auto", 1),
        ("ddp", "ddp", 2),
        ("fsdp2", "fsdp2", 2),
        ("directory", DIRECTORY, 2),
    ):
        folders[name] = root / name
        finish(start(command(root / name, strategy, devices), devices), root / name / "log_0.txt")
    return folders


@pytest.mark.parametrize(
    ("source", "strategy", "devices"),
    [
        ("fsdp2", "auto", 1),
        ("fsdp2", "ddp", 2),
        ("one", "fsdp2", 2),
        ("ddp", "fsdp2", 2),
        ("directory", DIRECTORY, 2),
        ("directory", "fsdp2", 1),
        ("one", DIRECTORY, 2),
    ],
)
def test_another_strategy_goes_on(root, written, source, strategy, devices):
    name = f"{source}_to_{strategy if isinstance(strategy, str) else 'directory'}_{devices}"
    argv = command(root / name, strategy, devices, resume=step_six(written[source]))
    finish(start(argv, devices), root / name / "log_0.txt")
    expected, found = student(written["one"]), student(root / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-4, key
    assert min(line["position"] for line in records(root / name, devices)) == 13


def test_a_directory_for_one_process_is_refused_with_a_way_out(root, written):
    argv = command(root / "refused", "auto", 1, resume=step_six(written["directory"]))
    (process,) = start(argv, 1)
    process.join(60)
    said = (root / "refused" / "log_0.txt").read_text()
    assert process.exitcode == 2
    assert "--trainer.strategy fsdp2" in said
    assert "Traceback" not in said


def test_lightnings_own_fsdp2_does_not_go_on(root, written):
    strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    folder, source = root / "foreign", step_six(written["one"])
    (process,) = start(command(folder, strategy, 1, resume=source), 1)
    process.join(60)
    said = (folder / "log_0.txt").read_text()
    assert process.exitcode == 2, said[-2000:]
    assert f"go on from {source} with --trainer.strategy fsdp2" in said
    assert not records(folder, 1)


def test_a_flipped_bit_in_a_shard_is_refused_by_all_and_the_newest_complete_one_named(
    root, written
):
    copied = root / "flipped" / "copied"
    shutil.copytree(written["directory"] / "checkpoints", copied)
    for damaged in (copied / "last.ckpt", *copied.glob("*step=12.ckpt")):
        (shard,) = damaged.glob("__1_*.distcp")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    (complete,) = copied.glob("*step=9.ckpt")
    argv = command(root / "flipped", DIRECTORY, 2, resume=copied / "last.ckpt")
    processes = start(argv, 2)
    for process in processes:
        process.join(60)
    said = (root / "flipped" / "log_0.txt").read_text()
    assert [process.exitcode for process in processes] == [2, 2], said[-2000:]
    assert "last.ckpt is no checkpoint that can be read safely: its bytes are not" in said
    assert f"The newest complete one beside it is {complete}" in said
    assert "Traceback" not in said
    assert not records(root / "flipped", 2)


def flip_a_letter(about):
    about.write_text(about.read_text().replace("pad_token_id", "pad_poken_id"))


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (Path.unlink, "it is incomplete: about.json, which is written last, is missing"),
        (partial(os.truncate, length=1000), "its file about.json is cut short or damaged"),
        (flip_a_letter, "its bytes are not those that were written (about.json)"),
    ],
)
def test_a_directory_that_says_nothing_true_of_itself_is_refused(
    root, written, tmp_path, hurt, said
):
    copied = tmp_path / "copied"
    shutil.copytree(written["directory"] / "checkpoints", copied)
    hurt(copied / "last.ckpt" / "about.json")
    (complete,) = copied.glob("*step=12.ckpt")
    folder = root / f"about_{tmp_path.name}"
    (process,) = start(command(folder, "fsdp2", 1, resume=copied / "last.ckpt"), 1)
    process.join(60)
    log = (folder / "log_0.txt").read_text()
    assert process.exitcode == 2, log[-2000:]
    assert f"last.ckpt is no checkpoint that can be read safely: {said}" in log
    assert f"The newest complete one beside it is {complete}" in log
    assert "Traceback" not in log
    assert not records(folder, 1)


def test_no_checkpoint_has_a_teacher(written):
    for name in ("one", "ddp", "fsdp2"):
        weights = torch.load(step_six(written[name]), weights_only=True)["state_dict"]
        assert weights
        assert all(key.startswith("student.") for key in weights)


def die_at_a_renaming(*, count):
    seen = []

    def counted(renaming):
        def renamed(self, target):
            if self.name.startswith("last.ckpt"):
                seen.append(self)
                if len(seen) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
            return renaming(self, target)

        return renamed

    Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)


@pytest.mark.parametrize("renamed", ["before", "between"])
def test_a_kill_while_a_directory_is_put_in_place_leaves_the_one_before(root, written, renamed):
    """The first rank dies when the shards are written, or when the old directory has been moved."""
    folder = root / f"killed_{renamed}"
    # Of the first checkpoint one renaming, of each later one two.
    prepare = partial(die_at_a_renaming, count=2 if renamed == "before" else 3)
    processes = start(command(folder, DIRECTORY, 2), 2, prepare)
    processes[0].join(60)
    for process in processes:
        process.kill()
        process.join()
    assert processes[0].exitcode == -signal.SIGKILL
    last = folder / "checkpoints" / "last.ckpt"
    assert last.exists() == (renamed == "before")
    finish(start(command(folder, DIRECTORY, 2, resume=last), 2), folder / "log_0.txt")
    assert differences(outcome(written["directory"], 2), folder, 2) == []
