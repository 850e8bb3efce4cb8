"""Writing of a cache: shards that are complete or not there, a lock, and continuation after a kill."""

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from lightning_kd.cache.manifest import (
    HEAD,
    MANIFEST,
    Manifest,
    ShardEntry,
    identity,
    is_unfinished,
    read_manifest,
    shard_name,
    write_file,
    write_manifest,
)
from lightning_kd.cache.shards import Shard, ShardRows
from lightning_kd.resuming import SHOWN, differences

_MARGIN = 1.02
"""Space that is asked for, over the planes alone: for the index of each shard and the manifest."""


class CacheWriter:
    """The shards of a cache, written by one run of one or several processes.

    Args:
        directory: Of the cache; made if it is not there.
        about: What is written and by what, as JSON has it. A directory that was written with another
            description is refused; with the same, what is complete stays.
        shards: How many there will be.
        holds_lock: Whether this process locks the directory while the context is open: the first of
            a run does.

    Raises:
        ValueError: If another run writes there, or something else is there.
    """

    def __init__(
        self, directory: Path, about: Mapping[str, Any], shards: int, *, holds_lock: bool = True
    ) -> None:
        self.directory, self.shards = directory, shards
        self.about = json.loads(json.dumps(about))
        self._holds_lock = holds_lock
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Lock the directory, and look at what is there."""
        if self._holds_lock:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                there = (self.directory, *self.directory.parents)
                other = next(path for path in there if os.path.lexists(path))
                raise ValueError(
                    f"{self.directory} is to be the directory of a cache, and {other} is no directory; "
                    "choose another one"
                ) from error
            self._lock = os.open(self.directory, os.O_RDONLY)
            try:
                self._take()
                self._look()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unlock it."""
        self._release()

    def has(self, number: int) -> bool:
        """Return whether a shard is there; if it is, it is complete."""
        return (self.directory / shard_name(number)).is_file()

    def check_keys(self, number: int, keys: Sequence[bytes]) -> None:
        """Compare the rows of a complete shard with those that are to be in it.

        Raises:
            ValueError: If they are other ones.
        """
        if self._shard(number).keys.tobytes() != b"".join(keys):
            raise ValueError(
                f"{self.directory / shard_name(number)} has other rows than the data, which has "
                "changed since it was written. Use the data as it was, choose another directory, or "
                "delete this one"
            )

    def check_space(self, size: float) -> None:
        """Refuse to begin what the disk cannot hold.

        Args:
            size: Bytes of all that is still to be written.

        Raises:
            OSError: If less space is free.
        """
        free = shutil.disk_usage(self.directory).free
        if free < _MARGIN * size:
            raise OSError(
                errno.ENOSPC,
                f"{_MARGIN * size / 1e6:,.1f} MB are still to be written and {free / 1e6:,.1f} MB are "
                "free there. Free some, choose another directory, or a smaller kind of cache: top_k "
                "with fewer tokens",
                str(self.directory),
            )

    def write(self, number: int, rows: ShardRows) -> None:
        """Write a shard.

        Raises:
            OSError: If it cannot be written; those that are complete stay.
        """
        try:
            rows.write(self.directory / shard_name(number), identity(self.about))
        except OSError as error:
            done = sum(map(self.has, range(self.shards)))
            raise OSError(
                error.errno,
                f"{error.strerror}: shard {number} could not be written. {done} of {self.shards} "
                "shards are complete and stay; once there is space, the same command continues there",
                str(self.directory),
            ) from error

    def finish(self, head: Mapping[str, Tensor]) -> Manifest:
        """Write what all rows share, and the manifest of a complete cache.

        Raises:
            ValueError: If a shard is missing or damaged.
        """
        content = save(dict(head)) if head else b""
        if head:
            write_file(self.directory / HEAD, content)
        entries = tuple(self._shard(number).entry for number in range(self.shards))
        manifest = Manifest(self.about, entries, zlib.crc32(content), complete=True)
        write_manifest(self.directory, manifest)
        for path in self.directory.iterdir():
            if is_unfinished(path.name):
                path.unlink()
        return manifest

    def _take(self) -> None:
        assert self._lock is not None  # __enter__ has opened it
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing a cache to {self.directory}; wait for it, end it, or "
                "choose another directory"
            ) from error

    def _look(self) -> None:
        others = [p.name for p in self.directory.iterdir() if not is_unfinished(p.name)]
        if not others:
            write_manifest(self.directory, Manifest(self.about))
            return
        if MANIFEST not in others:
            raise ValueError(
                f"{self.directory} is no cache and not empty (it has {sorted(others)[0]}); choose "
                "another directory"
            )
        manifest = read_manifest(self.directory)
        if changed := list(differences(dict(manifest.about), self.about)):
            shown = "; ".join(changed[:SHOWN])
            raise ValueError(
                f"{self.directory} has a cache of something else: {shown}. Choose another directory, "
                "or delete this one"
            )
        for number in range(self.shards):
            if self.has(number):
                self._shard(number, *manifest.shards[number : number + 1]).check_rows()

    def _shard(self, number: int, entry: ShardEntry | None = None) -> Shard:
        return Shard(self.directory / shard_name(number), identity(self.about), entry)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
