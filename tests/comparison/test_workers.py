"""Processes that threads start and wait for."""

import os
import threading
import time
from pathlib import Path

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
