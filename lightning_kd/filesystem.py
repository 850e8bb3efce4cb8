"""Files and directories that are complete or not there at all."""

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = -100
"""Linux's AT_FDCWD: relative paths begin at the working directory."""

_EXCHANGE = 2
"""Linux's RENAME_EXCHANGE: both names change hands at once."""


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete whenever it is there; directories above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _half_of(path) as half:
        half.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, so that it is complete whenever it is there."""
    with _half_of(path) as half:
        shutil.copyfile(source, half)


@contextmanager
def _half_of(path: Path) -> Iterator[Path]:
    """Give the file to be written, which takes the name when all has been; nothing is left else."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield half
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def digest_file(path: Path) -> str:
    """Return a digest of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def replace_directory(fresh: Path, place: Path) -> None:
    """Give a complete directory its name; another one of that name is removed afterwards.

    A process that is killed meanwhile leaves the old directory or the new one under the name. Where
    the file system cannot exchange two names, it may also leave both under other names (``.old`` and
    ``.fresh``).

    Args:
        fresh: The new directory, on the same file system.
        place: Its name. What is there is a directory, or nothing.

    Raises:
        OSError: If it cannot be renamed.
    """
    if not place.exists() or not any(place.iterdir()):
        fresh.rename(place)
    elif _exchange(fresh, place):
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        old = place.with_name(f"{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old, ignore_errors=True)


def flush(directory: Path) -> None:
    """Flush all files of a directory to the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def check_writable(place: Path) -> None:
    """Validate that a directory could be made at a path, without making it.

    Raises:
        OSError: If it could not.
    """
    parent = place
    while not parent.exists() or parent == place:
        parent = parent.parent
    with tempfile.TemporaryDirectory(prefix=".writable.", dir=parent):
        pass


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = (ctypes.c_char_p(os.fsencode(path)) for path in (one, other))
    first, second = paths
    if rename(_HERE, first, _HERE, second, ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number), str(other))
