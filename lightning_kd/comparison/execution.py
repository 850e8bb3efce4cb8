"""The runs of a comparison, one or several at once, with a line for each."""

import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.plan import Job
from lightning_kd.comparison.records import Records, State
from lightning_kd.comparison.run_files import read_json
from lightning_kd.comparison.workers import Workers


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    job: Job
    result: dict[str, Any] | None
    """None where it failed or was not started."""
    error: str = ""
    seconds: float = 0.0
    """How long it took now."""
    lacking: Sequence[str] = ()
    """Metrics that its test did not give."""


class Execution:
    """Makes the runs that are not there yet.

    Args:
        jobs: All runs, each after those that it reads.
        records: What they have left.
        workers: Run the commands.
        metrics: Numbers that a run's line shows, and that its test must give.
        console: Where lines go.
        at_once: How many run at the same time.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        records: Records,
        workers: Workers,
        metrics: Sequence[Metric],
        console: Console,
        at_once: int = 1,
    ) -> None:
        self.jobs, self.records, self.workers = jobs, records, workers
        self.metrics, self.console, self.at_once = metrics, console, at_once
        self._took: dict[str, list[float]] = {}
        self._seen: set[str] = set()

    def run_all(self, states: Sequence[State]) -> list[Outcome]:
        """Make all runs; those after a signal, or whose start has failed, are not begun.

        Args:
            states: How far each has come.

        Returns:
            What became of each that was there, begun or could not begin, in the order of the runs.
        """
        outcomes: dict[Path, Outcome] = {}
        waiting: list[tuple[Job, State]] = []
        for job, state in zip(self.jobs, states, strict=True):
            if state.tested:
                result = read_json(job.directory / "result.json")
                outcomes[job.directory] = Outcome(job, result)
                self._seen |= result["metrics"].keys()
            else:
                waiting.append((job, state))
        number, running = len(waiting), dict[Future[Outcome], Job]()
        with self.workers.listening(), ThreadPoolExecutor(self.at_once) as pool:
            while not self.workers.stopped() and (waiting or running):
                for job, state in self._startable(waiting, outcomes, self.at_once - len(running)):
                    waiting.remove((job, state))
                    running[pool.submit(self._begin, job, state, outcomes)] = job
                # Python handles signals in this thread, which sleeps if another one has caught them.
                ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    job, outcome = running.pop(future), future.result()
                    if outcome.result is None and self.workers.stopped():
                        continue
                    if outcome.result is not None:
                        self._took.setdefault(job.variant.name, []).append(outcome.seconds)
                        self._seen |= outcome.result["metrics"].keys()
                    elif waiting and (unknown := {*outcome.lacking} - self._seen):
                        # A name that no run has given is misspelt, and all would fail by it.
                        why = f"no run has given {', '.join(sorted(unknown))}: no other was begun"
                        outcome = replace(outcome, error=f"{outcome.error}; {why}")
                        number -= len(waiting)
                        waiting.clear()
                    outcomes[job.directory] = outcome
                    left = [*running.values(), *(job for job, _ in waiting)]
                    self._show(outcome, number - len(left), number, left)
        for future, job in running.items():  # ended by the signal, or in time
            if future.result().result is not None:
                outcomes[job.directory] = future.result()
        self._check_read(states, outcomes)
        return [outcomes[job.directory] for job in self.jobs if job.directory in outcomes]

    def _check_read(self, states: Sequence[State], outcomes: dict[Path, Outcome]) -> None:
        """Fail runs that were there and have read others that were made anew, and are others now."""
        there = {job.directory for job, s in zip(self.jobs, states, strict=True) if s.tested}
        if there >= outcomes.keys():
            return
        for job in self.jobs:
            if job.directory in there and _reads(job):
                changed = self.records.state(job).changed
                if changed:
                    said = f"{changed} changed meanwhile; --rerun_changed makes it anew"
                    outcomes[job.directory] = Outcome(job, None, said)

    def _startable(
        self,
        waiting: Sequence[tuple[Job, State]],
        outcomes: Mapping[Path, Outcome],
        places: int,
    ) -> list[tuple[Job, State]]:
        """Return the first runs that need to wait for no other."""
        ready = [(job, state) for job, state in waiting if outcomes.keys() >= _reads(job)]
        return ready[:places]

    def _begin(self, job: Job, state: State, outcomes: Mapping[Path, Outcome]) -> Outcome:
        """Make a run, unless one that it reads has failed."""
        started = time.monotonic()
        read = [outcomes[path] for path in _reads(job)]
        failed = next((outcome.job for outcome in read if outcome.result is None), None)
        if failed is not None:
            return Outcome(job, None, f"not started, because {failed.title} failed")
        if state.error:
            return Outcome(job, None, state.error)
        try:
            found = self._run(job, state)
        except Exception as error:  # a full disk, say: one run fails by it, the others may not
            return Outcome(job, None, f"{type(error).__name__}: {error}")
        return replace(found, seconds=time.monotonic() - started)

    def _run(self, job: Job, state: State) -> Outcome:
        """Train, unless that is done, and test."""
        try:
            self.records.check_students(job, state)
        except ValueError as error:
            return Outcome(job, None, f"{error}")
        self.records.clear(job, state)
        self.records.prepare(job)
        commands = ["fit", "test"] if job.variant.shown else ["fit"]
        for command in commands[state.trained :]:
            words = self._words(job, command, state)
            left, log = job.directory / f"{command}.json", job.directory / "log.txt"
            left.unlink(missing_ok=True)
            with log.open("a") as file:
                file.write(f"$ lightning-kd {shlex.join(words)}\n")
            code = self.workers.run(words, left, log)
            if code or not left.exists():
                return Outcome(job, None, f"{command} failed: {_last_words(log, code)} ({log})")
            if command == "fit":
                self.records.trained(job)
        result = self.records.finish(job)
        lacking = [m.name for m in self.metrics if m.name not in result["metrics"]]
        if lacking and job.variant.shown:
            (job.directory / "result.json").unlink()
            given = ", ".join(sorted(result["metrics"]))
            said = f"its test gave no {', '.join(lacking)}; it gave {given}"
            return Outcome(job, None, said, lacking=lacking)
        return Outcome(job, result)

    def _show(self, outcome: Outcome, place: int, number: int, left: Sequence[Job]) -> None:
        self.console.print(
            f"[{place}/{number}] {self._line(outcome)}; {self._left(left)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _words(self, job: Job, command: str, state: State) -> list[str]:
        if command == "fit":
            on = ["--ckpt_path", str(state.checkpoint)] if state.checkpoint else []
            return ["fit", "--config", str(job.directory / "fit.yaml"), *on]
        return [job.stage, "--config", str(job.directory / "test.yaml")]

    def _line(self, outcome: Outcome) -> str:
        if outcome.result is None:
            return f"{outcome.job.title}: {outcome.error}"
        found = outcome.result["metrics"]
        shown = self.metrics or [Metric(name) for name in sorted(found)[:3]]
        shown = [metric for metric in shown if metric.name in found]
        numbers = [f"{m.shown} {m.text(found[m.name])}" for m in shown]
        seconds = f"{outcome.result['cost']['seconds']:.0f} s of training"
        return f"{outcome.job.title}: {', '.join([*numbers, seconds])}"

    def _left(self, jobs: Sequence[Job]) -> str:
        if not jobs:
            return "none left"
        known = [seconds for took in self._took.values() for seconds in took]
        if not known:
            return f"{len(jobs)} left"
        expected = sum(fmean(self._took.get(job.variant.name, known)) for job in jobs)
        return f"about {_duration(expected / self.at_once)} left"


def _reads(job: Job) -> set[Path]:
    """Return the directories of the runs whose students a run reads."""
    return {*job.fit_reads, *job.test_reads}


def check_unchanged(jobs: Sequence[Job], states: Sequence[State], *, rerun: bool) -> list[State]:
    """Return states of runs that are what is asked for, or are made anew.

    Args:
        jobs: The runs.
        states: Their states.
        rerun: Whether changed ones are made anew.

    Raises:
        ValueError: If some have changed and are not to be made anew.
    """
    changed = [(j, s) for j, s in zip(jobs, states, strict=True) if s.changed]
    if changed and not rerun:
        lines = [f"  {job.title} ({job.directory}): {state.changed}" for job, state in changed]
        raise ValueError(
            "\n".join(
                [
                    "these runs are there, and are not what is asked for:",
                    *lines[:10],
                    *([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []),
                    "--rerun_changed makes them anew; or give another --output",
                ]
            )
        )
    return [replace(state, changed="") for state in states]


def _last_words(log: Path, code: int) -> str:
    """Return the error that a log ends with, in a line."""
    if code < 0:
        return f"ended by signal {-code}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    since = max(i for i, line in enumerate(lines) if line.startswith("$ "))
    own = [line for line in lines[since + 1 :] if line]
    errors = [i for i, line in enumerate(own) if line.startswith("lightning-kd: error: ")]
    if errors:
        return " ".join(own[errors[-1] :]).removeprefix("lightning-kd: error: ")[:500]
    return own[-1][:500] if own else f"exit code {code}"


def _duration(seconds: float) -> str:
    """Write a duration.

    Example:
        >>> _duration(40), _duration(200), _duration(9000)
        ('40 s', '3 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
