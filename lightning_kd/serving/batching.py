"""The queue of a server: one thread computes, several requests together where they allow it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from lightning_kd.serving.limits import Limits, RefusedError


class Job:
    """A request that waits for the thread that computes.

    Args:
        work: What is computed.
        group: Jobs of one group may be computed together; None is computed alone.
        rows: Rows of its batch.
        length: Tokens of its longest row.

    Attributes:
        done: Set when there is an outcome.
        outcome: What was computed, or the error.
        dropped: Set when nobody waits for it any more.
    """

    def __init__(self, work: Any, group: Hashable | None, rows: int, length: int) -> None:
        self.work, self.group, self.rows, self.length = work, group, rows, length
        self.done, self.dropped = threading.Event(), threading.Event()
        self.outcome: Any = None


class Batcher:
    """Computes jobs in one thread, in the order in which they came.

    A job that belongs to a group takes along the waiting ones of its group, as far as they fit into
    ``limits.batch_tokens``. Jobs are never divided.

    Args:
        compute: Work of one job, or of several of one group -> their outcomes.
        limits: Of the server.
    """

    def __init__(self, compute: Callable[[Sequence[Any]], Sequence[Any]], limits: Limits) -> None:
        self._compute, self._limits = compute, limits
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = self._busy = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        self._thread.start()

    def answer(self, job: Job) -> Any:
        """Compute a job, after those that wait.

        Raises:
            RefusedError: If too many wait, it takes too long, or the server is ending.
        """
        with self._changed:
            if self._closed:
                raise RefusedError(503, "the server is ending; ask another one")
            if len(self._waiting) >= self._limits.queue:
                raise RefusedError(
                    503, f"{len(self._waiting)} requests are waiting, and no more can; come again"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        if not job.done.wait(self._limits.answer_seconds):
            job.dropped.set()
            raise RefusedError(
                504, f"the answer was not ready after {self._limits.answer_seconds:g} s"
            )
        if isinstance(job.outcome, Exception):
            raise job.outcome
        return job.outcome

    @property
    def alive(self) -> bool:
        """Whether jobs are computed."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> bool:
        """Take no further jobs, and finish those that wait.

        Returns:
            Whether they were finished within ``limits.drain_seconds``.
        """
        end = time.monotonic() + self._limits.drain_seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not (self._waiting or self._busy), max(0.0, end - time.monotonic())
            )

    def _run(self) -> None:
        while jobs := self._next():
            try:
                outcomes = list(self._compute([job.work for job in jobs]))
            except Exception as error:  # the next request may be another one
                outcomes = [error] * len(jobs)
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.outcome = outcome
                job.done.set()
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> list[Job]:
        """Wait for jobs; none are left when the batcher was closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                while self._waiting and self._waiting[0].dropped.is_set():
                    self._waiting.popleft()
                if self._waiting:
                    self._busy = True
                    return self._together()
                self._changed.notify_all()
                if self._closed:
                    return []

    def _together(self) -> list[Job]:
        first = self._waiting.popleft()
        jobs, rows, length = [first], first.rows, first.length
        if first.group is None:
            return jobs
        for job in list(self._waiting):
            longest = max(length, job.length)
            fits = (rows + job.rows) * longest <= self._limits.batch_tokens
            if job.group == first.group and fits and not job.dropped.is_set():
                jobs.append(job)
                rows, length = rows + job.rows, longest
                self._waiting.remove(job)
        return jobs
