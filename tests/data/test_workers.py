import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_kd.data import Collator, EvaluationLoader, Example, TrainingLoader
from tests.support.scripts import ROOT

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


class Stuck:
    """Rows that name the process that reads them; the fifth is never read to its end."""

    def __len__(self):
        return 8

    def example(self, row, pass_):
        if row == 4:
            time.sleep(1000)
        return Example([os.getpid()])


class Numbers(Stuck):
    """Rows that are all read."""

    def example(self, row, pass_):
        return Example([row])


def gone(process):
    """Does a process end within ten seconds?"""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("kind", [TrainingLoader, EvaluationLoader])
def test_a_worker_that_hangs_ends_the_run_by_name(kind, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    seed = {"seed": 0} if kind is TrainingLoader else {}
    loader = kind(Stuck(), Collator(0), batch_size=1, num_workers=1, worker_timeout=0.5, **seed)
    workers = set()
    expected = r"(?s)prepared no batch in 0\.5 s.*num_workers: 0 .* raise\s+data\.worker_timeout"
    with pytest.raises(TimeoutError, match=expected):
        workers.update(int(batch["input_ids"]) for batch in loader)
    assert all(gone(worker) for worker in workers)


class Deaf(Stuck):
    """Rows of which none is read to its end, and whose reader hears nothing meanwhile."""

    def example(self, row, pass_):
        return sum(itertools.repeat(0))  # one call of C, which keeps the interpreter to itself


def test_a_worker_that_hears_nothing_is_killed(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr("lightning_kd.data.workers._LAST_WAIT", 0.5)
    before = set(multiprocessing.active_children())
    loader = EvaluationLoader(Deaf(), Collator(0), batch_size=1, num_workers=1, worker_timeout=0.5)
    with pytest.raises(TimeoutError):
        list(loader)
    for _ in range(100):  # until the system has killed it
        if set(multiprocessing.active_children()) <= before:
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on")


class Named(Stuck):
    """Rows that name the process that reads them."""

    def example(self, row, pass_):
        return Example([os.getpid()])


@pytest.mark.parametrize(
    ("sent", "error", "said"),
    [
        (signal.SIGSTOP, TimeoutError, r"data\.num_workers"),
        (signal.SIGKILL, RuntimeError, "DataLoader worker .* is killed by signal"),
    ],
)
def test_a_worker_that_is_stopped_or_killed_ends_the_run(sent, error, said, monkeypatch):
    """Batches of it are in the queue already."""
    monkeypatch.setattr("lightning_kd.data.workers._LAST_WAIT", 0.5)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = EvaluationLoader(Named(), Collator(0), batch_size=1, num_workers=1, worker_timeout=2)
    batches = iter(loader)
    worker = int(next(batches)["input_ids"])
    with pytest.raises(error, match=said):
        [os.kill(worker, sent) for batch in batches if not time.sleep(0.5)]
    batches.close()
    assert gone(worker)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_start_in_every_way(method, monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method(method)
    loader = EvaluationLoader(
        Numbers(), Collator(0), batch_size=4, num_workers=1, worker_timeout=60
    )
    assert [batch["row"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_error_of_a_worker_stays_what_it_is():
    class Broken(Stuck):
        def example(self, row, pass_):
            raise RuntimeError("no such row")

    loader = EvaluationLoader(Broken(), Collator(0), batch_size=1, num_workers=1)
    with pytest.raises(RuntimeError, match="no such row"):
        list(loader)


RUN = """
import os, signal, subprocess
from lightning_kd.data import Collator, EvaluationLoader
from tests.data.test_workers import Stuck

asked = []
asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
for number in asking:
    signal.signal(number, lambda number, frame: asked.append(number))
loader = EvaluationLoader(Stuck(), Collator(0), batch_size=1, num_workers=2, worker_timeout=30)
for row, batch in zip(range(4), loader):
    if row == 0:
        for number in asking:
            os.killpg(0, number)
    worker = int(batch["input_ids"])
    for number in asking:
        subprocess.run(["kill", "-s", str(int(number)), str(worker)], check=True)
    print(worker, flush=True)
assert len(asked) == 5
os.kill(os.getpid(), signal.SIGKILL)
"""


def in_a_session(code):
    """Run a script that may signal its whole process group."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_workers_outlive_signals_to_all_processes_and_end_with_the_main_one():
    """The main process needs their batches to finish its step; one of them hangs when it is killed."""
    run = in_a_session(RUN)
    workers = {int(line) for line in run.stdout.split()}
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(run.stdout.split()) == 4
    assert len(workers) == 2
    assert all(gone(worker) for worker in workers)


STARTING = """
import os, signal, threading, time
import torch
from lightning_kd.data import Collator, EvaluationLoader
from tests.data.test_workers import Numbers

asked, main, own = [], os.getpid(), torch.set_num_threads
asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
for number in asking:
    signal.signal(number, lambda number, frame: asked.append(number))

def slow(count):
    own(count)
    if os.getpid() != main:
        time.sleep(4)

torch.set_num_threads = slow  # a worker calls it when it has torch's handlers, and none of ours
send = lambda: [os.killpg(0, number) for number in asking]
threading.Timer(2, send).start()
loader = EvaluationLoader(Numbers(), Collator(0), batch_size=1, num_workers=2, worker_timeout=60)
rows = [int(batch["input_ids"]) for batch in loader]
assert rows == list(range(8)), rows
assert len(asked) == 5, asked
"""


def test_workers_outlive_signals_to_all_processes_while_they_start():
    run = in_a_session(STARTING)
    assert run.returncode == 0, run.stderr
