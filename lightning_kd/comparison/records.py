"""What a run has left, and whether it is still what is asked for."""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.comparison.contents import contents, sources, student_content
from lightning_kd.comparison.options import differences
from lightning_kd.comparison.plan import Job, student_of
from lightning_kd.comparison.run_files import (
    check_student,
    keep_checksums,
    read_json,
    sealed,
    why_not,
    write_json,
)
from lightning_kd.filesystem import write_text
from lightning_kd.imports import OwnModules
from lightning_kd.named_checkpoints import find_checkpoint

PACKAGES = ("lightning-kd", "torch", "lightning", "transformers")
"""Packages whose versions make figures others."""

_OUTPUT = "{output}"
"""Stands for the directory of all runs."""

_BEFORE_RECORD = ("fit.yaml", "test.yaml")
"""What is written before what says that a directory is that of a run."""

_ANOTHER_START = "a run whose student it reads"


@dataclass(frozen=True)
class State:
    """How far a run has come."""

    trained: bool = False
    tested: bool = False
    changed: str = ""
    """What is not as it was when the run began; empty if nothing is."""
    checkpoint: Path | None = None
    """Where training goes on."""
    error: str = ""
    """Why it cannot go on, and what to do; empty if it can."""


def versions() -> dict[str, str]:
    """Return the versions that are installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


class Records:
    """Records of the runs below one directory.

    Args:
        jobs: All runs, in order.
        output: The directory, which may be moved as a whole.
        metrics: Names of the numbers that a test must give.
        configs: Files that a user's own classes may lie beside.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        output: Path,
        metrics: Sequence[str] = (),
        configs: Sequence[str] = (),
    ) -> None:
        self.output, self.metrics, self.versions = output, metrics, versions()
        finder = OwnModules.of_arguments(configs)
        self._own_files = cache(lambda name: finder.files([name]))
        self._sources = sources()
        self._jobs = {job.directory: job for job in jobs}
        pictures = {f"_{job.budget}" if job.budget else "" for job in jobs} | {""}
        names = {f"{kind}{budget}.png" for kind in ("curves", "bars") for budget in pictures}
        names |= {"compare.lock", "report.json", "report.md"}
        self._made = {*self._jobs, *(output / name for name in names)}
        self._fits: dict[Path, str] = {}
        for job in jobs:
            read = [self._fits[place] for place in job.fit_reads]
            self._fits[job.directory] = self._fingerprint(job.fit, read)

    def prepare(self, job: Job) -> None:
        """Write what a run is given, before it begins."""
        for name, config in (("fit", job.fit), ("test", job.test)):
            text = yaml.safe_dump(dict(config), sort_keys=False)
            write_text(job.directory / f"{name}.yaml", text)
        given, found = self._given(job), self._contents(job)
        used = {self._sources}
        before = read_json(job.directory / "given.json")
        if before is not None:  # it goes on, as what it was when it began
            found["fit"] = _contents_then(before)["fit"]
            used |= {*before.get("sources", ["unknown"])}
        for name, places in (("fit", job.fit_reads), ("test", job.test_reads)):
            for place in places:
                read = read_json(place / "given.json")
                found[name] |= _contents_then(read)["fit"]
                used |= {*read.get("sources", ["unknown"])}
        more = {"stage": job.stage, "sources": sorted(used), "contents": found}
        write_json(job.directory / "given.json", given | more)

    def state(self, job: Job) -> State:
        """Return how far a run has come, and what has changed since."""
        place = job.directory
        before = read_json(place / "given.json")
        if before is None or not {"fit", "test", "versions"} <= before.keys():
            return _without_record(place)
        given, now = self._given(job), self._contents(job)
        then = _contents_then(before)
        files = {name: self._other_contents(then[name], now[name]) for name in then}
        if before["fit"] != given["fit"] or before["versions"] != given["versions"] or files["fit"]:
            return State(changed=self._what_changed(job, before) or files["fit"] or _ANOTHER_START)
        trained = read_json(place / "fit.json") is not None and job.student.is_dir()
        found = None
        if not trained and [*(place / "checkpoints").glob("*.ckpt*")]:
            try:
                found = find_checkpoint("last", [place / "checkpoints"])
            except (ValueError, OSError) as error:
                said = f"{error}; remove that file to go on from another, or remove {place}"
                return State(error=f"{said} to begin anew")
        result = read_json(place / "result.json")
        expected = {"run": job.variant.name, "budget": job.budget, "seed": job.seed}
        expected |= {"fit": given["fit"]}
        if not job.variant.shown:
            wrong = "" if result is None or not trained else why_not(result, expected)
            return State(trained, trained and result is not None, wrong, found)
        measured = read_json(place / "test.json") is not None
        stage = before.get("stage", job.stage)
        other = f"{stage} -> {job.stage}" if stage != job.stage else files["test"]
        if measured and (before["test"] != given["test"] or other):
            said = differences(place / "test.yaml", job.test) or other or _ANOTHER_START
            return State(trained, changed=said, checkpoint=found)
        if not trained or not measured or result is None:
            return State(trained, checkpoint=found)
        wrong = why_not(result, {**expected, "test": given["test"]})
        complete = not wrong and {*self.metrics} <= result["metrics"].keys()
        return State(trained, complete, wrong, found)

    def check_metrics(self, jobs: Sequence[Job], states: Sequence[State]) -> None:
        """Validate that no metric is one that tests of the same code have not given.

        Args:
            jobs: The runs.
            states: Their states.

        Raises:
            ValueError: If one is: the same tests would be made again, and lack it again.
        """
        told: list[str] = []
        for job, state in zip(jobs, states, strict=True):
            result = read_json(job.directory / "result.json") if state.trained else None
            if result is None or not job.variant.shown or result.get("sources") != self._sources:
                continue
            if result["test"] == self._given(job)["test"]:
                told += result["metrics"]
        unknown = [name for name in self.metrics if name not in told] if told else []
        if unknown:
            near = get_close_matches(unknown[0], told, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"metrics: none of the tests that are there gave {', '.join(unknown)}; {hint}they gave "
                f"{', '.join(sorted({*told}))}"
            )

    def clear(self, job: Job, state: State) -> None:
        """Remove what a run has left that nothing can go on from.

        Args:
            job: The run.
            state: Its state. A trained student stays where only the test is another.
        """
        (job.directory / "result.json").unlink(missing_ok=True)
        if not state.trained and state.checkpoint is None and job.directory.exists():
            shutil.rmtree(job.directory)

    def trained(self, job: Job) -> None:
        """Write down what the student of a run is, when its training has ended."""
        keep_checksums(job.directory)

    def check_students(self, job: Job, state: State) -> None:
        """Compare the students that a run reads, its own among them, with what was written.

        Raises:
            ValueError: If one has other bytes.
        """
        own = [job.directory] if state.trained else []
        for place in dict.fromkeys([*own, *job.fit_reads, *job.test_reads]):
            check_student(place)

    def finish(self, job: Job) -> dict[str, Any]:
        """Put together what training and test have left, and return it."""
        fit = read_json(job.directory / "fit.json")
        test = read_json(job.directory / "test.json") if job.variant.shown else {"metrics": {}}
        result = {
            "run": job.variant.name,
            "budget": job.budget,
            "seed": job.seed,
            **self._given(job),
            "sources": ", ".join(read_json(job.directory / "given.json")["sources"]),
            "metrics": test["metrics"],
            "at_the_end_of_training": fit["metrics"],
            "cost": fit["cost"],
            "device": fit["device"],
            "jobs": fit.get("jobs"),  # which an earlier release did not count
        }
        result = sealed(result)
        write_json(job.directory / "result.json", result)
        return result

    def _given(self, job: Job) -> dict[str, Any]:
        fit = self._fits[job.directory]
        read = [self._fits[place] for place in job.test_reads]
        test = self._fingerprint(job.test, [fit, *read])
        return {"fit": fit, "test": test, "versions": self.versions}

    def _contents(self, job: Job) -> dict[str, dict[str, str]]:
        """Return digests of what training and test read now, with what the runs read that they read."""
        fit = contents(job.fit, self._own_files, self._made, all_splits=False)
        test = contents(job.test, self._own_files, self._made, all_splits=True)
        for found, places in ((fit, job.fit_reads), (test, job.test_reads)):
            for place in places:
                found |= self._contents(self._jobs[place])["fit"]
                student = student_of(place)
                if (digest := student_content(student)) is not None:
                    found[f"{student}"] = digest
        # The directory of all runs may be moved.
        inside, moved = f"{self.output}/", f"{_OUTPUT}/"
        return {
            name: {
                moved + path.removeprefix(inside) if path.startswith(inside) else path: digest
                for path, digest in found.items()
            }
            for name, found in (("fit", fit), ("test", test))
        }

    def _other_contents(self, then: Mapping[str, str], now: Mapping[str, str]) -> str:
        """Return what was there and is there with other contents, in a line."""
        names = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
        said = ", ".join(names).replace(_OUTPUT, f"{self.output}")
        return f"the contents of {said}" if names else ""

    def _fingerprint(self, config: Mapping[str, Any], read: list[str]) -> str:
        known = json.dumps([config, read], sort_keys=True, default=str)
        known = known.replace(f"{self.output}", _OUTPUT)
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def _what_changed(self, job: Job, before: Mapping[str, Any]) -> str:
        others = [
            f"{name} {before['versions'].get(name)} -> {own}"
            for name, own in self.versions.items()
            if before["versions"].get(name) != own
        ]
        return ", ".join(others) or differences(job.directory / "fit.yaml", job.fit)


def _contents_then(given: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the digests of a record; none where an earlier release wrote it."""
    found: dict[str, dict[str, str]] = given.get("contents", {"fit": {}, "test": {}})
    return found


def _without_record(place: Path) -> State:
    """Return the state of a run without a record of what it was given.

    Raises:
        ValueError: If there is what no comparison has made.
    """
    if (place / "given.json").exists():
        return State(
            error=f"{place / 'given.json'} is cut short, so that what the run was given is not known; "
            f"remove {place} to have it made anew"
        )
    names = [path.name for path in place.iterdir()] if place.is_dir() else []
    others = sorted(n for n in names if n not in _BEFORE_RECORD and not n.startswith("."))
    if others or (place.exists() and not place.is_dir()):
        raise ValueError(
            f"{place} is there and was not made by compare"
            + (f" (it has {', '.join(others[:3])})" if others else "")
            + "; move it, or give another --output"
        )
    return State()
