"""Digests of what options name: files, directories, modules of a user's own, and the library itself."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_kd.comparison.options import flat
from lightning_kd.data.readers import ending
from lightning_kd.filesystem import digest_file

_WRITTEN = re.compile(r"(on_policy|predictions)\.path|trainer\.logger\..*|export\..*")
"""Options whose files a run writes."""

_OTHER_SPLITS = re.compile(r"data\.(.*\.)?(test|predict)(\.\d+)?")
"""Data that training does not read."""


def contents(
    config: Mapping[str, Any],
    modules: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    all_splits: bool,
) -> dict[str, str]:
    """Return a digest of each file, directory and own module that a configuration names.

    Args:
        config: All options.
        modules: Files of a user's own modules, by module.
        output: Directory of all runs. What is in it has been made by them, from what is outside.
        all_splits: Whether data of tests are read too.
    """
    found: dict[str, str] = {}
    for name, value in flat(config).items():
        if not isinstance(value, str) or _WRITTEN.fullmatch(name):
            continue
        if _OTHER_SPLITS.fullmatch(name) and not all_splits:
            continue
        module, dot, _ = value.partition(".")
        if dot and module in modules:
            files = modules[module]
            about = files[0].name if len(files) == 1 else f"package {module}"
            found[about] = _digest((path.name, path) for path in files)
        digest = None if value in found else content_of(value, output)
        if digest is not None:
            found[value] = digest
    return found


def content_of(path: str, left_out: Path | None = None) -> str | None:
    """Return a digest of a file, of all files of a directory, or of those that a pattern finds.

    Args:
        path: As an option gives it.
        left_out: A directory that is not read.

    Returns:
        The digest; None where nothing is there, or nothing else than what is left out.
    """
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        files = [("", Path(path))]
    elif os.path.isdir(path):
        files = [(str(file.relative_to(path)), file) for file in _below(Path(path))]
    elif has_magic(path) and ending(path):
        files = [(name, Path(name)) for name in glob(path) if os.path.isfile(name)]
    else:
        files = []
    if left_out is not None:
        files = [(name, file) for name, file in files if not _inside(file, left_out)]
    return _digest(files) if files else None


def sources() -> str:
    """Return a digest of the library's own code."""
    root = Path(__file__).parents[1]
    # In a checkout a directory of the package is a link, which rglob does not follow.
    places = [root, *(place for place in root.iterdir() if place.is_symlink() and place.is_dir())]
    files = [file for place in places for file in place.rglob("*.py")]
    return _digest((str(file.relative_to(root)), file) for file in files)


def _below(directory: Path) -> Iterator[Path]:
    """Yield the files of a directory, without hidden ones and those of caches: tools leave them."""
    for place, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "__"))]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _inside(path: Path, directory: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name, path in sorted(files):
        about = path.stat()
        hashed.update(f"{name}\0{_of_file(path, about.st_size, about.st_mtime_ns)}\0".encode())
    return hashed.hexdigest()


@cache
def _of_file(path: Path, size: int, changed: int) -> str:
    """Read a file once in a process, and again when it has been written to."""
    return digest_file(path)
