"""Processes that threads start and wait for."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_kd.comparison.workers import Workers


class Process:
    """A process whose exit code is read in some time, in which nobody else may read one."""

    reading = 0
    overlaps = 0
    exitcode = 0
    pid = 0

    def __init__(self, **_: object):
        self.sentinel, self._end = os.pipe()
        self._left = 3

    def _read(self):
        Process.reading += 1
        time.sleep(0.002)
        Process.overlaps += Process.reading > 1
        Process.reading -= 1

    def start(self):
        self._read()
        os.write(self._end, b"x")

    def is_alive(self):
        self._read()
        self._left -= 1
        return self._left > 0

    def join(self):
        self._read()
        os.close(self.sentinel)
        os.close(self._end)


class Context:
    Process = Process


def test_one_thread_at_a_time_reads_exit_codes():
    workers = Workers(print, "os")
    workers._context = Context
    codes = []

    def run():
        for _ in range(5):
            codes.append(workers.run([], Path("left"), Path("log")))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [0] * 15
    assert Process.overlaps == 0


def test_signals_that_come_together_are_one_and_a_later_one_ends_runs_at_once(monkeypatch):
    sent, now = [], [100.0]
    monkeypatch.setattr("lightning_kd.comparison.workers._send", lambda _, n: sent.append(n))
    monkeypatch.setattr("lightning_kd.comparison.workers.time.monotonic", lambda: now[0])
    workers = Workers(print, "os")
    workers._running.add(object())
    with workers.listening():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        now[0] += 60
        signal.raise_signal(signal.SIGHUP)
        assert sent == [signal.SIGTERM]
        now[0] += 60
        signal.raise_signal(signal.SIGTERM)
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    assert workers.received == signal.SIGHUP


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_all_processes_has_every_worker_save_and_is_waited_for(number, tmp_path):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.comparison.two_workers"],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while not (Path("begun_a").exists() and Path("begun_b").exists()):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert said == ""
    assert [Path(f"left_{name}").read_text() for name in "ab"] == ["saved"] * 2
