"""What a run has left, and whether it is still what is asked for."""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.comparison.contents import contents, sources
from lightning_kd.comparison.options import differences
from lightning_kd.comparison.plan import Job
from lightning_kd.filesystem import write_text
from lightning_kd.imports import OwnModules
from lightning_kd.named_checkpoints import find_checkpoint

PACKAGES = ("lightning-kd", "torch", "lightning", "transformers")
"""Packages whose versions make figures others."""

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


def versions() -> dict[str, str]:
    """Return the versions that are installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


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
        self._modules = OwnModules.of_arguments(configs).files()
        self._sources = sources()
        self._jobs = {job.directory: job for job in jobs}
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
                found[name] |= _contents_then(read_json(place / "given.json"))["fit"]
        more = {"stage": job.stage, "sources": sorted(used), "contents": found}
        write_json(job.directory / "given.json", given | more)

    def state(self, job: Job) -> State:
        """Return how far a run has come, and what has changed since."""
        place = job.directory
        before = read_json(place / "given.json")
        if before is None:
            return State()
        given, now = self._given(job), self._contents(job)
        then = _contents_then(before)
        files = {name: _other_contents(then[name], now[name]) for name in then}
        if before["fit"] != given["fit"] or before["versions"] != given["versions"] or files["fit"]:
            return State(changed=self._what_changed(job, before) or files["fit"] or _ANOTHER_START)
        trained = (place / "fit.json").exists() and job.student.is_dir()
        found = None
        if not trained:
            saved = [*(place / "checkpoints").glob("*.ckpt*")]
            found = find_checkpoint("last", [place / "checkpoints"]) if saved else None
        result = read_json(place / "result.json")
        if not job.variant.shown:
            return State(trained, trained and result is not None, "", found)
        measured = (place / "test.json").exists()
        stage = before.get("stage", job.stage)
        other = f"{stage} -> {job.stage}" if stage != job.stage else files["test"]
        if measured and (before["test"] != given["test"] or other):
            said = differences(place / "test.yaml", job.test) or other or _ANOTHER_START
            return State(trained, changed=said, checkpoint=found)
        complete = measured and result is not None and {*self.metrics} <= result["metrics"].keys()
        return State(trained, trained and complete, "", found)

    def clear(self, job: Job, state: State) -> None:
        """Remove what a run has left that nothing can go on from.

        Args:
            job: The run.
            state: Its state. A trained student stays where only the test is another.
        """
        (job.directory / "result.json").unlink(missing_ok=True)
        if not state.trained and state.checkpoint is None and job.directory.exists():
            shutil.rmtree(job.directory)

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
        write_json(job.directory / "result.json", result)
        return result

    def _given(self, job: Job) -> dict[str, Any]:
        fit = self._fits[job.directory]
        read = [self._fits[place] for place in job.test_reads]
        test = self._fingerprint(job.test, [fit, *read])
        return {"fit": fit, "test": test, "versions": self.versions}

    def _contents(self, job: Job) -> dict[str, dict[str, str]]:
        """Return digests of what training and test read now, with what the runs read that they read."""
        fit = contents(job.fit, self._modules, self.output, all_splits=False)
        test = contents(job.test, self._modules, self.output, all_splits=True)
        for found, places in ((fit, job.fit_reads), (test, job.test_reads)):
            for place in places:
                found |= self._contents(self._jobs[place])["fit"]
        return {"fit": fit, "test": test}

    def _fingerprint(self, config: Mapping[str, Any], read: list[str]) -> str:
        known = json.dumps([config, read], sort_keys=True, default=str)
        known = known.replace(f"{self.output}", "{output}")
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


def _other_contents(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return what was there and is there with other contents, in a line."""
    names = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    return f"the contents of {', '.join(names)}" if names else ""
