"""The command, in a process of its own: it answers, ends when asked, and may be killed or frozen."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import SaveOnTermination
from lightning_kd.data import ArithmeticData
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher, ServedTeacher, TeacherUnavailableError
from tests.support.command_line import CONFIGS, DEBUG, QUIET, SMALL
from tests.support.harness import trainer
from tests.support.pages import commands
from tests.support.toys import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(*arguments, log):
    """``lightning-kd serve`` on a free port: the process and its URL."""
    command = [sys.executable, "-m", "lightning_kd", "serve", "--port", "0", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r" at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield process, found[1]
    finally:
        process.kill()
        process.wait(30)


class AtStep(Callback):
    """Do something at the start of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action()


def fit(teacher, *callbacks, steps=5):
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0, vocab_size=14)), teacher=teacher)
    run = trainer(max_steps=steps, callbacks=list(callbacks))
    run.fit(module, datamodule=ArithmeticData(digits=2, batch_size=4))
    return [p.detach().clone() for p in module.student.parameters()]


@pytest.mark.processes
def test_a_process_answers_as_this_one_does_and_ends_when_it_is_asked(saved_teacher, tmp_path):
    log = tmp_path / "log"
    with serving("--teacher.name_or_path", saved_teacher, log=log) as (process, url):
        local = fit(LocalTeacher(str(saved_teacher)))
        assert all(map(torch.equal, local, fit(ServedTeacher([url]))))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "ending, after what is waiting" in log.read_text()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "cannot be reached|broken off"), (signal.SIGSTOP, "not answered within 2 s")],
)
def test_a_process_that_is_killed_or_frozen_ends_the_run(saved_teacher, tmp_path, number, message):
    arguments = ("--teacher.name_or_path", saved_teacher)
    with serving(*arguments, log=tmp_path / "log") as (process, url):
        teacher = ServedTeacher([url], timeout=2.0, retries=1)
        hit = AtStep(2, lambda: process.send_signal(number))
        began = time.monotonic()
        with pytest.raises(TeacherUnavailableError, match=message):
            fit(teacher, hit, SaveOnTermination(str(tmp_path)))
        assert time.monotonic() - began < 60
        process.send_signal(signal.SIGCONT)
    # What was asked about ahead may have been answered before.
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] in {2, 3}


def test_help_explains(cli, capsys):
    with pytest.raises(SystemExit):
        cli("serve", "--help")
    said = capsys.readouterr().out
    assert "Serve a teacher to training runs in other processes" in said
    assert "--limits.length" in said
    assert "Longest row, in tokens" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher.config", "{model_type: llama}"], "give --tokenizer"),
        (["--teacher.name_or_path", "./nothing"], "'./nothing' does not exist"),
        (["--teacher.name_or_path", "x", "--limits.queue", "0"], "limits.queue is 0"),
        (["--teacher.name_or_path", "x", "--port", "99999"], "port is 99999; give a number from 1"),
        (["--teacher.name_or_path", "x", "--port", "-1"], "port is -1; give a number from 1"),
        (["--teacher.name_or_path", "x", "--device", "gpu"], "device is 'gpu'; on this machine"),
        (
            ["--teacher.name_or_path", "x", "--token_variable", "NOT_SET"],
            "the environment variable NOT_SET is not set",
        ),
    ],
)
def test_what_cannot_be_served_is_said(fails, arguments, message):
    assert message in fails("serve", *arguments)


def test_a_port_in_use_is_said(fails, saved_teacher):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails("serve", "--teacher.name_or_path", saved_teacher, "--port", port)
    assert f"cannot listen at 127.0.0.1 port {port}" in said
    assert "give another --port" in said


def test_the_commands_of_the_page_serve_a_teacher_and_train_from_it(saved_teacher, tmp_path, cli):
    """The commands of docs/served.md, on a free port."""
    serve, fit_ = commands("docs/served.md")
    shown = {"--teacher.name_or_path": "runs/teacher", "--port": "8765"}
    assert dict(zip(serve[2::2], serve[3::2], strict=True)) == shown
    (tmp_path / "configs").symlink_to(CONFIGS)
    with serving("--teacher.name_or_path", saved_teacher, log=tmp_path / "log") as (_, url):
        here = [word.replace("http://127.0.0.1:8765", url) for word in fit_]
        assert here != fit_
        cli(*here[1:], *DEBUG, *QUIET, "--model.student.config", SMALL)
    assert list(Path("runs").glob("version_*/student/model.safetensors"))
