"""Digests of what options name: files, directories, modules of a user's own, and the library itself."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_kd.comparison.options import flat
from lightning_kd.comparison.outputs import written_files
from lightning_kd.data.readers import ending
from lightning_kd.filesystem import digest_file
from lightning_kd.imports import named_modules

_WRITTEN = re.compile(r"predictions\.path|trainer\.logger\..*|export\..*")
"""Options whose files a run writes."""

_OTHER_SPLITS = re.compile(r"data\.(.*\.)?(test|predict)(\.\d+)?")
"""Data that training does not read."""


def contents(
    config: Mapping[str, Any],
    own_files: Callable[[str], Mapping[str, Sequence[Path]]],
    made: Collection[Path],
    *,
    all_splits: bool,
) -> dict[str, str]:
    """Return a digest of each file, directory and own module that a configuration names.

    Args:
        config: All options, with all that is filled in.
        own_files: Returns files of a module if it is a user's own, and of those that it imports.
        made: What the comparison writes: directories of runs, which are made of what is outside of
            them, and files.
        all_splits: Whether data of tests are read too.
    """
    found: dict[str, str] = {}
    written = written_files(config)
    for name, value in flat(config).items():
        if not isinstance(value, str) or _WRITTEN.fullmatch(name) or name in written:
            continue
        if _OTHER_SPLITS.fullmatch(name) and not all_splits:
            continue
        for named in sorted(named_modules(value)):
            for module, files in own_files(named).items():
                about = files[0].name if len(files) == 1 else f"package {module}"
                found[about] = _digest((path.name, path) for path in files)
        digest = None if value in found else content_of(value, made)
        if digest is not None:
            found[value] = digest
    return found


def student_content(student: Path) -> str | None:
    """Return a digest of an exported student: weights, configuration and tokenizer; None if none."""
    # Its card says when it was made and how long that took.
    files = [path for path in _below(student) if path.name != "README.md"]
    return _digest((str(path.relative_to(student)), path) for path in files) if files else None


def content_of(path: str, left_out: Collection[Path] = ()) -> str | None:
    """Return a digest of a file, of all files of a directory, or of those that a pattern finds.

    Args:
        path: As an option gives it.
        left_out: Directories and files that are not read.

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
    if left_out:
        out = {os.path.abspath(directory) for directory in left_out}
        files = [(name, file) for name, file in files if out.isdisjoint(_above(file))]
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


def _above(file: Path) -> Iterator[str]:
    """Yield a file and the directories that it is in."""
    whole = Path(os.path.abspath(file))
    return map(str, (whole, *whole.parents))


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
