"""Files that a run leaves: complete or taken for not there, and what was written or said not to be."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_kd.filesystem import write_text
from lightning_kd.integrity import check_directory, checksums

_DIGEST = "digest"
"""In a result: of all else in it."""

_STUDENT = "student"
"""In what training has left: checksums of the exported student."""

_CARD = "README.md"
"""Of a student; anybody may write on."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a record; None where there is none, or only a part, as a power cut leaves it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with a digest of what it says."""
    return {**result, _DIGEST: _digest(result)}


def why_not(result: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return why a result is not that of a run, in a line; empty where it is.

    Args:
        result: As read; that of an earlier release has no digest.
        expected: What it must say.
    """
    others = [
        f"{name} {result.get(name)!r} and not {value!r}"
        for name, value in expected.items()
        if result.get(name) != value
    ]
    if others:
        return f"its result.json is of {', '.join(others)}"
    said = {name: value for name, value in result.items() if name != _DIGEST}
    if result.get(_DIGEST, _digest(said)) != _digest(said):
        return "its result.json is not what was written"
    return ""


def keep_checksums(directory: Path) -> None:
    """Write down what the student of a run is, when its training has ended."""
    fit = read_json(directory / "fit.json")
    found = checksums(directory / "student")
    found.pop(_CARD, None)
    write_json(directory / "fit.json", fit | {_STUDENT: found})


def check_student(directory: Path) -> None:
    """Compare the student of a run with what was written.

    Raises:
        ValueError: If it has other bytes. That of an earlier release is taken as it is.
    """
    fit = read_json(directory / "fit.json") or {}
    try:
        check_directory(directory / "student", fit.get(_STUDENT, {}))
    except ValueError as error:
        raise ValueError(
            f"the student in {directory / 'student'} is damaged: {error}; remove {directory} to have "
            "the run made anew"
        ) from error


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
