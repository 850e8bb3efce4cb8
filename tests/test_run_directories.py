"""Runs that are started together have a directory each."""

import multiprocessing
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_kd.run_directories import claim_version
from tests.support.command_line import EXPECTED_WARNINGS, fit

pytestmark = EXPECTED_WARNINGS
LOGGERS = {"TensorBoardLogger": TensorBoardLogger, "CSVLogger": CSVLogger}


def _claim(kind, start, numbers):
    trainer = L.Trainer(logger=LOGGERS[kind]("runs", name=""), accelerator="cpu", devices=1)
    start.wait(timeout=60)
    claim_version(trainer)
    numbers.put(trainer.logger.version)


@pytest.mark.processes
@pytest.mark.parametrize("kind", LOGGERS)
def test_many_at_once_claim_one_each(kind):
    context, count = multiprocessing.get_context("fork"), 12
    start, numbers = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_claim, args=(kind, start, numbers), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    found = [numbers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(found) == list(range(count))
    assert {path.name for path in Path("runs").iterdir()} == {f"version_{n}" for n in found}


def test_a_version_that_was_given_is_kept():
    for version in (7, "name"):
        trainer = L.Trainer(logger=TensorBoardLogger("runs", version=version), accelerator="cpu")
        claim_version(trainer)
        assert trainer.logger.version == version
    assert not Path("runs").exists()


def test_a_run_that_is_overtaken_takes_the_next_directory(cli, monkeypatch):
    """Another run makes the directory between this one's look and its own."""
    evaluate_no_grad = TensorBoardLogger._get_next_version

    def overtaken(logger):
        number = evaluate_no_grad(logger)
        Path(logger.root_dir, f"version_{number}").mkdir(parents=True)
        return number

    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", overtaken)
    cli(*fit("sft"))
    assert not list(Path("runs/version_0").iterdir())
    assert Path("runs/version_1/student/model.safetensors").exists()
    assert len(list(Path("runs/version_1").glob("events.*"))) == 1


def test_runs_are_written_where_the_trainer_is_told(cli):
    cli(*fit("sft", "--trainer.default_root_dir", "scratch"))
    assert not Path("runs").exists()
    again = ["--config", "scratch/version_0/config.yaml", "--trainer.max_steps", 2]
    cli("fit", *again)
    assert Path("scratch/version_1/config.yaml").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.logger.save_dir", "other"], "trainer.default_root_dir is 'scratch'.*'other'"),
        (["--trainer.logger", "false"], None),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "other"], None),
    ],
)
def test_two_places_for_runs_are_refused_where_one_has_no_effect(cli, capsys, options, said):
    command = fit("sft", "--trainer.default_root_dir", "scratch", *options)
    if said is None:
        cli(*command)
        return
    with pytest.raises(SystemExit) as ended:
        cli(*command)
    assert ended.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not Path("scratch").exists()
