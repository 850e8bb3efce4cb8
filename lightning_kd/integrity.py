"""Integrity of checkpoints: their bytes are those that were written."""

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABOUT = "about.json"
"""In a directory: by whom it was written, shapes of weights, checksums; it is looked at first."""

_CHECKSUM = "checksum"
"""In that file: of all else in it."""

_RECORD: dict[str, int | bytes] = {
    "compress_type": zipfile.ZIP_STORED,
    "create_system": 0,
    "reserved": 0,
    "volume": 0,
}
_RECORD |= {"internal_attr": 0, "external_attr": 0, "comment": b""}
"""Fields of each record in torch's central directory, which has no checksum."""

_FLAGS = 0x08 | 0x800
"""Flags of a record that torch writes: sizes behind the data, names in UTF-8."""

_LARGE = b"\x01\x00"
"""Start of the extra field of a record of more than 4 GB."""

_ABOUT_HAS = {"saved_by", "weights", "run", "step", "best", "weights_only", "checksums"}


def check_file(path: Path) -> None:
    """Compare each part of a file with the checksum that was written with it.

    Raises:
        ValueError: If it is no archive of torch, is cut short, or has other bytes than were written.
    """
    if not path.exists():
        raise FileNotFoundError(f"the checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            # First, for torch leaves a tensor as it is in memory whose record is called a directory.
            damaged = _not_of_torch(archive.infolist()) or archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"it is cut short, or no checkpoint at all ({error})") from error
    if damaged is not None:
        raise ValueError(f"its bytes are not those that were written ({damaged})")


def _not_of_torch(records: Sequence[zipfile.ZipInfo]) -> str | None:
    """Return the name of a record that torch would not have written so."""
    names: set[str] = set()
    for record in records:
        known = all(getattr(record, name) == value for name, value in _RECORD.items())
        known &= record.compress_size == record.file_size and not record.flag_bits & ~_FLAGS
        known &= record.extra[:2] in {b"", _LARGE} and not record.is_dir()
        if not known or record.filename in names:
            return record.filename
        names.add(record.filename)
    return None


def checksums(directory: Path, share: slice = slice(None)) -> dict[str, int]:
    """Return a checksum (CRC-32) of each file below a directory, by its name, or of a share of them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ABOUT)
    return {str(path.relative_to(directory)): _checksum(path) for path in files[share]}


def write_about(directory: Path, about: Mapping[str, Any]) -> None:
    """Write what a directory says of itself, with a checksum of its own; it is written last."""
    text = json.dumps(about)
    # Read back, for JSON makes lists of tuples and text of keys.
    (directory / ABOUT).write_text(json.dumps(json.loads(text) | {_CHECKSUM: _text_checksum(text)}))


def read_about(directory: Path) -> dict[str, Any]:
    """Read what a directory says of itself.

    Raises:
        ValueError: If it does not, so that it is not complete, or its text differs from the saved one.
    """
    try:
        about = json.loads((directory / ABOUT).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"it is incomplete: {ABOUT}, which is written last, is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"its file {ABOUT} is cut short or damaged ({error})") from error
    if not isinstance(about, dict) or _CHECKSUM not in about:
        raise ValueError(
            f"its file {ABOUT} has no checksum: it is damaged, or of an earlier version of this library"
        )
    if about.pop(_CHECKSUM) != _text_checksum(json.dumps(about)):
        raise ValueError(f"its bytes are not those that were written ({ABOUT})")
    if lacking := sorted(_ABOUT_HAS - about.keys()):
        raise ValueError(f"its file {ABOUT} lacks {', '.join(lacking)}")
    return about


def check_directory(
    directory: Path, written: Mapping[str, int], share: slice = slice(None)
) -> None:
    """Compare the files of a directory, or a share of them, with the checksums written with it.

    Raises:
        ValueError: If one is missing, or has other bytes than were written.
    """
    for name, checksum in sorted(written.items())[share]:
        if not (directory / name).is_file():
            raise ValueError(f"its file {name} is missing")
        if _checksum(directory / name) != checksum:
            raise ValueError(f"its bytes are not those that were written ({name})")


def _text_checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum
