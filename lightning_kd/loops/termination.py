"""Signals that terminate a run, noted until it can end well."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from lightning_kd.loops.requeue import handler_before, requeues

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""From the cluster, by Ctrl-C, or of a closed terminal."""


class TerminationSignals:
    """Note the first SIGTERM, SIGINT or SIGHUP that comes; a second Ctrl-C ends the process."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal that has come; 0 if none has."""
        self._previous: dict[int, Any] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Install handlers in the place of the trainer's, but for a signal that requeues a job."""
        self.received = 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows signal handlers only there

        def handle(number: int, frame: FrameType | None) -> None:
            self.received = self.received or number
            # Even while the process waits in code that Python cannot interrupt.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN  # as by nohup
            if not ignored and not (number == signal.SIGTERM and requeues(trainer)):
                self._previous[number] = handler_before(trainer, number)
                signal.signal(number, handle)

    def restore(self) -> None:
        """Install the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
