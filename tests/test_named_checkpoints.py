"""--ckpt_path last and best, what is evaluated, and where."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_kd import SFT, ArithmeticData, LocalTeacher, SequenceKD, StudentSpec
from lightning_kd.named_checkpoints import find_checkpoint
from tests.support.command_line import EXPECTED_WARNINGS, SMALL, fit
from tests.support.scripts import ROOT

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.filterwarnings("ignore:The dirpath has changed")]


def write(path, step, best=None, monitor="val/loss"):
    path.parent.mkdir(exist_ok=True)
    state = {"monitor": monitor, "best_model_path": "" if best is None else str(best)}
    callbacks = {"ModelCheckpoint{}": state, "HFExport": {"directory": None}}
    torch.save({"global_step": step, "callbacks": callbacks}, path)
    return path


def test_last_has_made_the_most_steps_and_best_is_what_it_knows(tmp_path):
    folder = tmp_path / "checkpoints"
    best = write(folder / "step=2.ckpt", 2)
    last = write(folder / "step=6.ckpt", 6, best=best)
    stale = write(folder / "last.ckpt", 4, best=last)
    os.utime(stale, (2e9, 2e9))  # copied later
    assert find_checkpoint("last", [folder]) == last
    assert find_checkpoint("best", [folder]) == best
    write(folder / "step=6.ckpt", 6, best="/elsewhere/step=2.ckpt")  # the run was moved
    assert find_checkpoint("best", [folder]) == best
    write(folder / "step=6.ckpt", 6, best=best, monitor=None)
    with pytest.raises(ValueError, match="has a monitor"):
        find_checkpoint("best", [folder])


def test_what_a_kill_left_while_it_was_replaced_is_the_last(tmp_path):
    write(tmp_path / "last.ckpt.old", 4)
    write(tmp_path / "last.ckpt.fresh", 6)
    assert find_checkpoint("last", [tmp_path]) == tmp_path / "last.ckpt"


def test_last_is_that_of_the_run_whose_config_is_given(cli, fails):
    save = {"every_n_train_steps": 1, "save_top_k": -1, "monitor": "train/tokens"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}
    command = fit("sft", "--trainer.enable_checkpointing", "true", "--data.validation_size", 20)
    command += ["--trainer.callbacks", json.dumps([callback]), "--trainer.log_every_n_steps", 1]
    for name in ("last", "best"):  # of no run: never started over
        assert "there is no checkpoint" in fails(*command, "--ckpt_path", name)
    assert not Path("runs").exists()
    cli(*command)
    run = ["--config", "runs/version_0/config.yaml"]
    cli("fit", *run, "--ckpt_path", "last", "--trainer.max_steps", 4)
    second = Path("runs/version_1")
    assert yaml.safe_load((second / "config.yaml").read_text())["ckpt_path"] is None
    steps = [torch.load(p, weights_only=True)["global_step"] for p in second.rglob("*.ckpt")]
    assert sorted(steps) == [3, 4]
    for name in ("last", "best"):
        cli("validate", *run, "--ckpt_path", name)
    assert "its weights are random" in fails("validate", *run)
    assert "its weights are random" in fails("predict", *run)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0", "version_1"]


def test_random_weights_are_not_evaluated_in_python(teacher):
    config = yaml.safe_load(SMALL)
    data = ArithmeticData(batch_size=4, test_size=4, validation_size=4, train_size=8)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False, "max_steps": 1}
    for evaluate in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match="its weights are random"):
            getattr(L.Trainer(**quiet), evaluate)(SFT(student=StudentSpec(config=config)), data)
    written = SequenceKD(student=StudentSpec(config=config), teacher=LocalTeacher(str(teacher)))
    L.Trainer(**quiet).predict(written, data, return_predictions=False)
    trained, trainer = SFT(student=StudentSpec(config=config)), L.Trainer(**quiet)
    trainer.fit(trained, data)
    trainer.test(trained, data, verbose=False)


@pytest.mark.parametrize(
    ("path", "said"), [("", "checkpoint '' does not exist"), ("/", "/ is a directory")]
)
def test_a_path_without_a_name_is_a_short_error(fails, path, said):
    assert said in fails(*fit("sft", f"--ckpt_path={path}"))


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_a_seed_out_of_range_is_a_short_error(fails, seed):
    assert f"seed_everything is {seed}" in fails(*fit("sft", f"--seed_everything={seed}"))


def rank_started_by(process):
    """The process of a second rank, among all that a process has started; None where it is not yet."""
    for task in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        try:
            variables = Path(f"/proc/{task}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"LOCAL_RANK=1" in variables:
            return int(task)
    return None


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_no_process_is_left_behind_while_ddp_is_set_up(number):
    command = [*fit("sft", "--trainer.strategy", "ddp", "--trainer.devices", 2)]
    command = [sys.executable, "-m", "lightning_kd", *map(str, command)]
    first = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240  # for its imports, on a busy machine
    second = None
    try:
        while (second := rank_started_by(first.pid)) is None:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # The second is still importing: there is no group of processes yet.
        os.kill(first.pid, number)
        assert first.wait(timeout=30) != 0
        deadline = time.monotonic() + 240
        while alive(second) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(second)
    finally:
        if first.poll() is None or (second and alive(second)):
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()


def test_last_is_looked_for_in_every_place_of_the_run(cli, monkeypatch):
    said = []
    connector = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    monkeypatch.setattr(f"{connector}.rank_zero_info", said.append)
    save = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    often = save | {"init_args": {"every_n_train_steps": 2, "save_last": True}}
    once = save | {
        "init_args": {"dirpath": "best", "every_n_train_steps": 1, "monitor": "train/lr"}
    }
    once["init_args"] |= {"mode": "max", "filename": "best-{step}"}
    command = fit("sft", "--trainer.enable_checkpointing", "true", "--trainer.max_steps", 2)
    rate = {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 0}}
    command += ["--model.lr_scheduler", json.dumps(rate), "--trainer.log_every_n_steps", 1]
    cli(*command, "--trainer.callbacks", json.dumps([often, once]))
    assert [path.name for path in Path("best").iterdir()] == ["best-step=1.ckpt"]
    run = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "last"]
    cli("fit", *run, "--trainer.max_steps", 4)
    assert any("checkpoint path at runs/version_0/checkpoints/last.ckpt" in text for text in said)
