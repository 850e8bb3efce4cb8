"""What a run leaves, and the commands that it prints to go on with: each is typed."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import EXPECTED_WARNINGS, QUIET, SMALL, fit

pytestmark = EXPECTED_WARNINGS

OWN = """
from lightning_kd.divergences import ForwardKL

class OwnKL(ForwardKL):
    pass
"""
SAVING = {"every_n_train_steps": 1, "save_last": True}


def saving(**options):
    name = "lightning.pytorch.callbacks.ModelCheckpoint"
    callback = {"class_path": name, "init_args": SAVING | options}
    return [
        *("--trainer.enable_checkpointing", "true"),
        *("--trainer.callbacks", json.dumps([callback])),
    ]


@pytest.fixture
def says(cli, caplog):
    """Run a command; return what it says at its end or start through Lightning's log."""

    def run(*arguments):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            cli(*arguments)
        return caplog.text

    return run


def printed(said):
    """The commands of this library that a run has printed, as a shell splits them."""
    return [shlex.split(line)[1:] for line in re.findall(r"^  (lightning-kd .*)$", said, re.M)]


def test_each_printed_command_runs_with_a_class_of_ones_own_and_a_blank_in_the_name(
    says, cli, teacher, monkeypatch
):
    Path("lab").mkdir()
    Path("lab/lab_after.py").write_text(OWN)
    options = {"divergence": "lab_after.OwnKL", "teacher": str(teacher)}
    options["student"] = {"config": yaml.safe_load(SMALL)}
    model = {"class_path": "SupervisedKD", "init_args": options}
    data = {"class_path": "ArithmeticData", "init_args": {"batch_size": 2, "validation_size": 4}}
    Path("lab/own.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    said = says(
        *("fit", "--config", "lab/own.yaml", *QUIET, "--trainer.max_steps", 2, *saving()),
        *("--trainer.default_root_dir", "my runs", "--trainer.val_check_interval", 1),
    )
    commands = printed(said)
    assert [command[0] for command in commands] == ["validate", "export", "fit"]
    (checkpoint,) = {command[4] for command in commands}
    alone = ["export", "--ckpt_path", checkpoint, "--export.dirpath", "alone"]
    for command in [*commands, alone]:
        monkeypatch.delitem(sys.modules, "lab_after")  # another process has not imported it
        cli(*command)
        assert sys.modules["lab_after"].__file__ == str(Path("lab/lab_after.py").resolve())
    assert Path("my runs/version_1/own_modules.txt").read_text() == f"{Path('lab').resolve()}\n"


def test_a_run_without_classes_of_ones_own_names_no_directory(says):
    said = says(*fit("sft", *saving(), "--trainer.limit_val_batches", 0))
    assert not Path("runs/version_0/own_modules.txt").exists()
    assert [command[0] for command in printed(said)] == ["export", "fit"]  # nothing to validate on


def test_the_newest_checkpoint_is_the_one_to_go_on_from(says):
    monitored = {"monitor": "val/loss", "save_top_k": 1, "every_n_train_steps": None}
    said = says(
        *fit("sft", *saving(**monitored), "--data.validation_size", 8),
        *("--trainer.val_check_interval", 1, "--model.optimizer.lr", 5),  # gets worse at once
    )
    steps = dict(re.findall(r"checkpoints/(\S+), a checkpoint of step (\d+)", said))
    newest = max(map(int, steps.values()))
    assert {steps[Path(command[4]).name] for command in printed(said)} == {str(newest)}
    stopped = "The run took 2 steps; no checkpoint has been saved since step 1" in said
    assert stopped == (newest == 1)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["fit", "--predictions.path", "x"], "--predictions.path has no effect on fit: it is for"),
        (["check", "--predictions.path=x"], "no effect on check: it is for predict"),
        (["cache", "--export.dirpath", "x"], "it is for fit and check and export"),
        (["export", "--model.alpha", "1"], "--model.alpha has no effect on export"),
        (["export", "--model.teacher", "x/y"], "--model.teacher has no effect on export"),
        (["export", "--data.train", "x"], "--data.train has no effect on export"),
    ],
)
def test_an_option_that_its_command_does_not_read_is_refused(fails, typed, said):
    Path("config.yaml").write_text("{}")
    assert said in fails(typed[0], "--config", "config.yaml", *typed[1:])


def test_an_evaluation_without_a_checkpoint_says_whose_weights_it_is_of(says, cli, teacher):
    started = ["--model.student.config", "null", "--model.student.name_or_path", teacher]
    cli(*fit("sft", *saving(), "--data.validation_size", 4), *started)
    config = ["validate", "--config", "runs/version_0/config.yaml"]
    said = says(*config)
    assert f"The student's weights are those of {teacher}, not those of the run in runs" in said
    assert "The student's weights are" not in says(*config, "--ckpt_path", "last")
