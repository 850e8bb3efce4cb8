"""Processes of one run end together, whatever ends one of them."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAUNCHER = "LIGHTNING_KD_LAUNCHER"
"""Environment variable with the id of the process that has started the others."""

_EVERY = 0.5
"""Seconds between two looks at who the parent is."""


def end_together() -> None:
    """Die at once of a signal until training listens, and with the process that started this one.

    A process may be waiting for the others in code that Python cannot interrupt, until the rendezvous
    times out. There is nothing to save before the first step, so that the signals keep what the
    system makes of them; and one whose launcher is gone would wait for it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.environ.get(_LAUNCHER) if "LOCAL_RANK" in os.environ else None
    if launcher is None and "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        launcher = str(os.getppid())
    if launcher is not None:
        _follow_unless_a_grandparent(int(launcher))
    os.environ[_LAUNCHER] = str(os.getpid())


def wait_for(launcher: Any) -> None:
    """Wait for the scripts that were started: they end at the latest a minute after this one.

    Args:
        launcher: The strategy's; None where there is none.
    """
    for process in getattr(launcher, "procs", ()):
        if isinstance(process, subprocess.Popen):
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


_TO_ALL = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that a terminal or a scheduler sends to all processes of a run."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back while processes start that are to ignore them: they inherit the mask.

    Until :func:`start_worker` has made it ignore them, a worker would end by one.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(main: int, worker: int) -> None:
    """Begin a process that prepares data: it ends with the main process, and never before it.

    A signal to all processes of a run (Ctrl-C, ``timeout``, a scheduler) asks the main process to
    save after its step, and for that step it needs the workers' batches. So they are a process group
    of their own, ignore what a terminal or a scheduler sends, and end on a SIGTERM of the main process
    alone; the handlers that they inherit would save and requeue.

    Args:
        main: Id of the main process.
        worker: Number of the worker.
    """
    os.setpgid(0, 0)
    for number in _TO_ALL - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    # One that came to all processes before this was a group of its own.
    signal.sigtimedwait({signal.SIGTERM}, 0)
    # The parent may be a fork server, which ends with the main process too.
    threading.Thread(target=_serve, args=(main, os.getppid()), daemon=True).start()


def _follow_unless_a_grandparent(launcher: int) -> None:
    """End with a launcher: it is the parent, or gone while this process was starting.

    Where it is neither, the variable was handed down through a process that has its own way of
    starting others, such as a fork server.
    """
    if os.getppid() == launcher:
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()
        return
    if not _exists(launcher):
        os._exit(128 + signal.SIGTERM)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY)
    os._exit(128 + signal.SIGTERM)


def _serve(main: int, parent: int) -> None:
    """End on a SIGTERM of the main process, and with it; every thread has SIGTERM blocked."""
    while os.getppid() == parent and _exists(main):
        received = signal.sigtimedwait({signal.SIGTERM}, _EVERY)
        if received is not None and received.si_pid == main:
            os._exit(0)  # anything else is an error to torch
    os._exit(128 + signal.SIGTERM)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
