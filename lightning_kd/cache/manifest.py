"""The manifest of a cache: what is in it, and whether all of it is."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
HEAD = "head.safetensors"
PART = ".part"
"""End of the name of a file while it is being written."""

FORMAT = 2

_SHARD = r"shard-\d{5,}\.safetensors"


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard."""

    rows: int
    tokens: int
    """Scored positions."""
    size: int
    """Of its file, in bytes."""
    index_checksum: int
    """CRC-32 of its header and of the keys, ends and checksums of its rows."""


@dataclass(frozen=True)
class Manifest:
    """Description of a cache, as JSON has it."""

    about: Mapping[str, Any]
    """What was written and by what: two caches of equal descriptions have equal files."""
    shards: tuple[ShardEntry, ...] = ()
    """Every shard, in order; none while the cache is being written."""
    head_checksum: int = 0
    """CRC-32 of the file ``head.safetensors``; 0 where there is none."""
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Scored positions of all shards."""
        return sum(shard.tokens for shard in self.shards)


def shard_name(number: int) -> str:
    """Return the name of a shard's file.

    Example:
        >>> shard_name(12)
        'shard-00012.safetensors'
    """
    return f"shard-{number:05d}.safetensors"


def is_unfinished(name: str) -> bool:
    """Return whether a file's name is that of a file of a cache that is being written.

    Example:
        >>> is_unfinished("shard-00012.safetensors.part"), is_unfinished("thesis.part")
        (True, False)
    """
    return re.fullmatch(rf"({_SHARD}|{HEAD}|{MANIFEST}){PART}", name) is not None


def identity(about: Mapping[str, Any]) -> str:
    """Return a digest of what a cache is of, which each of its shards carries."""
    text = json.dumps(about, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest in the place of the one that is there, if any, at once."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, sort_keys=True)
    checked = json.dumps({"checksum": zlib.crc32(text.encode()), "manifest": json.loads(text)})
    write_file(directory / MANIFEST, f"{checked}\n".encode())


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a cache.

    Raises:
        ValueError: If there is none, its bytes are not those that were written, or it is of another
            version.
    """
    path = directory / MANIFEST
    try:
        read = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{directory} is no cache of a teacher: it has no {MANIFEST}; lightning-kd cache writes one"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); {REWRITE}") from error
    said = read.get("manifest") if isinstance(read, dict) else None
    text = json.dumps(said, sort_keys=True)
    if not isinstance(said, dict) or read.get("checksum") != zlib.crc32(text.encode()):
        raise ValueError(f"the bytes of {path} are not those that were written; {REWRITE}")
    if said.pop("format") != FORMAT:
        raise ValueError(f"{path} is of another version of this library; {REWRITE}")
    shards = tuple(ShardEntry(**entry) for entry in said.pop("shards"))
    return Manifest(shards=shards, **said)


REWRITE = "delete the directory and write the cache again"
"""Way out of damage to the manifest."""

MEND = "delete the file, and the same lightning-kd cache writes it again"
"""Way out of damage to another file."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is complete or not there, whenever the machine stops.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
