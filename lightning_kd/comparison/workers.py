"""Commands in processes that are forked from one that has imported everything.

A run in a process of its own leaves no memory, seeds or handlers to the next, has a peak of memory of
its own, and can fail without the others. Importing takes as long as a small run: so it is done once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_kd.processes import signals_held

Entry = Callable[[Sequence[str], Path], None]
"""Runs a command line and leaves what came of it in a file; a function of a module."""

_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_GRACE = 600.0
"""Seconds that a run has to end its step and save."""

_TOGETHER = 2.0
"""Seconds in which signals count as one: ``timeout`` sends its to a process and to its group."""


class _Process(ForkServerProcess):
    """A process whose fork server is not ended by what a terminal or a scheduler sends to all."""

    def start(self) -> None:
        """Start it, and the server before the first one.

        The server has signals blocked as it begins, for good. That of resources begins before it, and
        whoever begins that one lets SIGINT and SIGTERM through again.
        """
        with signals_held():
            resource_tracker.ensure_running()
        with signals_held():
            super().start()


class _Context(ForkServerContext):
    Process = _Process


class Workers:
    """Processes that each run one command.

    Args:
        entry: What they run.
        module: What is imported before, with all that it imports.
    """

    def __init__(self, entry: Entry, module: str) -> None:
        self.entry = entry
        self.received: int = 0
        """Number of the signal that has come; 0 if none has."""
        self._since = 0.0
        self._context: Any = _Context()
        self._context.set_forkserver_preload([module])
        self._running: set[Any] = set()
        # start(), too, reads the exit codes of all processes, and an exit code can be read only once.
        self._reading = threading.Lock()

    def stopped(self) -> bool:
        """Return whether a signal has come."""
        return self.received != 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass signals on: the first asks runs to save and end, the second ends them at once.

        A terminal that is closed sends SIGHUP more than once, so that a second one asks for nothing.
        """
        before: dict[int, Any] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            since, self._since = self._since, time.monotonic()
            if self.received and (number == signal.SIGHUP or self._since - since < _TOGETHER):
                return
            passed = signal.SIGKILL if self.received else signal.SIGTERM
            self.received = self.received or int(number)
            for process in [*self._running]:
                _send(process, passed)

        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                    before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, words: Sequence[str], left: Path, log: Path) -> int:
        """Run a command and wait for its end; several threads may.

        Args:
            words: The command line, without the program's name.
            left: File for what comes of it.
            log: File that all it prints is appended to.

        Returns:
            Its exit code; below zero, minus the signal that has ended it.
        """
        process = self._context.Process(target=_work, args=(self.entry, words, left, log))
        with self._reading:
            process.start()
        self._running.add(process)
        if self.received:  # before there was anything to pass it on to
            _send(process, signal.SIGTERM)
        limit = None
        while self._is_alive(process):
            wait([process.sentinel], 0.5 if limit is None else limit)
            if limit is not None and self._is_alive(process):
                process.kill()
            limit = _GRACE if self.received else None
        self._running.discard(process)
        with self._reading:  # at once: it has ended
            process.join()
            return int(process.exitcode)

    def _is_alive(self, process: Any) -> bool:
        with self._reading:
            return bool(process.is_alive())


def _send(process: Any, number: int) -> None:
    """Send a signal to a process that may have ended."""
    # is_alive() takes the lock, which the thread that a handler interrupts may hold.
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _work(entry: Entry, words: Sequence[str], left: Path, log: Path) -> None:
    """Run a command as a process of its own: what a terminal sends goes to the comparison alone."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    entry(words, left)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None  # this is a worker
    wait([parent.sentinel])
    os._exit(128 + signal.SIGTERM)
