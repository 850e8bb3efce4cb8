"""What a run has left, and whether it is still what is asked for."""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.comparison.plan import Job
from lightning_kd.filesystem import write_text
from lightning_kd.named_checkpoints import find_checkpoint

PACKAGES = ("lightning-kd", "torch", "lightning", "transformers")
"""Packages whose versions make figures others."""


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
    """

    def __init__(self, jobs: list[Job], output: Path) -> None:
        self.output, self.versions = output, versions()
        self._fits: dict[Path, str] = {}
        for job in jobs:
            read = [self._fits[place] for place in job.fit_reads]
            self._fits[job.directory] = self._fingerprint(job.fit, read)

    def prepare(self, job: Job) -> None:
        """Write what a run is given, before it begins."""
        for name, config in (("fit", job.fit), ("test", job.test)):
            text = yaml.safe_dump(dict(config), sort_keys=False)
            write_text(job.directory / f"{name}.yaml", text)
        write_json(job.directory / "given.json", self._given(job))

    def state(self, job: Job) -> State:
        """Return how far a run has come, and what has changed since."""
        place = job.directory
        before = read_json(place / "given.json")
        if before is None:
            return State(checkpoint=None)
        given = self._given(job)
        trained = (place / "fit.json").exists() and job.student.is_dir()
        if before["fit"] != given["fit"] or before["versions"] != given["versions"]:
            return State(changed=self._what_changed(job, before))
        if before["test"] != given["test"]:
            return State(trained=trained, changed=_differences(place / "test.yaml", job.test))
        found = None
        if not trained:
            saved = [*(place / "checkpoints").glob("*.ckpt*")]
            found = find_checkpoint("last", [place / "checkpoints"]) if saved else None
        return State(trained, trained and (place / "result.json").exists(), "", found)

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
            "metrics": test["metrics"],
            "at_the_end_of_training": fit["metrics"],
            "cost": fit["cost"],
            "device": fit["device"],
        }
        write_json(job.directory / "result.json", result)
        return result

    def _given(self, job: Job) -> dict[str, Any]:
        fit = self._fits[job.directory]
        read = [self._fits[place] for place in job.test_reads]
        test = self._fingerprint(job.test, [fit, *read])
        return {"fit": fit, "test": test, "versions": self.versions}

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
        found = ", ".join(others) or _differences(job.directory / "fit.yaml", job.fit)
        return found or "a run whose student it reads"


def _differences(before: Path, now: Mapping[str, Any]) -> str:
    """Return the options that differ, in a line."""
    old, new = (flat(config) for config in (yaml.safe_load(before.read_text()), now))
    names = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    shown = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names[:3]]
    return ", ".join([*shown, *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])


def flat(part: Any, name: str = "") -> dict[str, Any]:
    """Return the values of a configuration by their options.

    Args:
        part: The configuration, or part of one.
        name: Option of the part.

    Example:
        >>> flat({"a": {"b": 1}, "c": [2, 3]})
        {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    if isinstance(part, list):
        part = {str(index): value for index, value in enumerate(part)}
    if not isinstance(part, Mapping) or not part:
        return {name: part}
    found: dict[str, Any] = {}
    for key, value in part.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found
