"""``lightning-kd cache``, and runs from what it has written."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.command_line import (
    CONFIGS,
    DEBUG,
    EXPECTED_WARNINGS,
    FROM_CACHE,
    QUIET,
    fit,
    run,
)

pytestmark = EXPECTED_WARNINGS
DATA = ["--data.train_size", "64", "--data.validation_size", "8"]
PLACE = "runs/teacher_cache"


def cache(teacher, *more, config="supervised_kd"):
    command = ["cache", "--config", CONFIGS / f"{config}.yaml", *DEBUG, *QUIET, *DATA]
    command += ["--model.teacher.name_or_path", teacher, "--cache.dirpath", PLACE]
    return [*command, *more]


def losses(directory):
    seen = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    seen.Reload()
    return {
        name: [event.value for event in seen.Scalars(name)]
        for name in ("train/loss", "train/divergence", "val/loss")
    }


def test_a_run_from_a_cache_is_the_run_with_its_teacher(cli, teacher):
    cli(*cache(teacher))
    cli(*fit("supervised_kd", *DATA, "--model.teacher.name_or_path", teacher))
    cli(*fit("supervised_kd", *DATA, *FROM_CACHE))
    assert losses("runs/version_0") == losses("runs/version_1")
    assert not Path("runs/version_2").exists()


def test_the_help_explains_the_command_and_its_options(cli, capsys):
    with pytest.raises(SystemExit):
        cli("cache", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "Write what the teacher of a method says about its data" in said
    assert "Directory of the cache. One that is incomplete is continued." in said
    assert "cache_writing.scribe" not in said


def test_a_run_with_generated_completions_makes_no_cache(fails, teacher):
    said = fails(*cache(teacher, config="gkd"))
    assert "on_policy generates texts during training" in said
    assert "give --on_policy null here" in said
    assert not Path(PLACE).exists()


def test_what_is_refused_is_said_in_a_line(cli, fails, teacher):
    cli(*cache(teacher))
    said = fails(*fit("supervised_kd", *DATA, "--data.train_size", "65", *FROM_CACHE))
    assert "data.train: row 64" in said
    assert "train_size: 64 -> 65" in said
    (Path(PLACE) / "manifest.json").unlink()
    assert "is no cache of a teacher" in fails(*fit("supervised_kd", *DATA, *FROM_CACHE))


def test_the_configuration_that_a_run_has_left_is_taken(cli, fails, teacher):
    cli(*fit("supervised_kd", *DATA, "--model.teacher.name_or_path", teacher))
    left = ["cache", "--config", "runs/version_0/config.yaml", "--cache.dirpath", PLACE]
    cli(*left)
    assert (Path(PLACE) / "manifest.json").exists()
    said = fails(*left, "--ckpt_path", "runs/version_0/config.yaml")
    assert "a cache reads no checkpoint" in said


def test_a_method_that_no_cache_can_serve_is_said_first(fails, teacher):
    said = fails(*cache(teacher, config="on_policy_distillation"))
    assert "OnPolicyDistillation asks its teacher about what the student generates" in said
    assert "--on_policy null" not in said


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_write_shards_of_their_own_and_read_them_together(teacher):
    python = (sys.executable, "-m", "lightning_kd")
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    done = run(*python, *cache(teacher, *two))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(Path(PLACE).glob("shard-*"))) == 4  # of training and validation, two each
    for more in (["--model.teacher.name_or_path", teacher], FROM_CACHE):
        done = run(*python, *fit("supervised_kd", *DATA, *two, *more))
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses("runs/version_0") == losses("runs/version_1")
