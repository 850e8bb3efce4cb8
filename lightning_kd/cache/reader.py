"""Reading of a cache: rows by their keys, from any shard."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from lightning_kd.cache.manifest import HEAD, MEND, identity, read_manifest, shard_name
from lightning_kd.cache.shards import Planes, Shard


class MissingRowError(ValueError):
    """A row that is not in a cache.

    Args:
        place: Its place among those that were asked for.
    """

    def __init__(self, place: int) -> None:
        super().__init__(f"row {place} of the batch is not in the cache")
        self.place = place


class CacheReader:
    """Planes of the rows of a complete cache.

    Args:
        directory: Written by :class:`~lightning_kd.cache.CacheWriter`.

    Raises:
        ValueError: If there is no complete cache.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        if not self.manifest.complete:
            raise ValueError(
                f"the cache {directory} is incomplete: writing it has not ended. Run the same "
                "lightning-kd cache again, which continues where it stopped"
            )
        self._shards: list[Shard] = []

    def open(self) -> None:
        """Map the shards and index their rows, once.

        Raises:
            ValueError: If one is missing, cut short, or has another index than was written.
        """
        if self._shards:
            return
        known = identity(self.manifest.about)
        self._shards = [
            Shard(self.directory / shard_name(number), known, entry)
            for number, entry in enumerate(self.manifest.shards)
        ]
        keys = [shard.keys.view("<u8").reshape(-1, 2) for shard in self._shards]
        places = [
            np.stack([np.full(len(own), number), np.arange(len(own))], 1)
            for number, own in enumerate(keys)
        ]
        together = np.concatenate(keys)
        # Stable, so that of equal rows the first is found, however many processes have written.
        order = np.lexsort((together[:, 1], together[:, 0]))
        self._keys, self._places = together[order], np.concatenate(places)[order]
        self._first = np.ascontiguousarray(self._keys[:, 0])

    def head(self) -> dict[str, Tensor]:
        """Return the tensors that all rows share; none where there are none.

        Raises:
            ValueError: If their bytes are not those that were written.
        """
        if not self.manifest.head_checksum:
            return {}
        path = self.directory / HEAD
        content = path.read_bytes() if path.is_file() else b""
        if zlib.crc32(content) != self.manifest.head_checksum:
            raise ValueError(f"the bytes of {path} are not those that were written; {MEND}")
        return load(content)

    def check_keys(self, keys: Sequence[bytes | None]) -> None:
        """Look for rows.

        Raises:
            MissingRowError: If there is no row of a key.
        """
        for place, key in enumerate(keys):
            if key is not None and self._find(key) is None:
                raise MissingRowError(place)

    def planes_of(self, keys: Sequence[bytes | None]) -> Planes:
        """Return the numbers at the positions of some rows, one row behind the other.

        Args:
            keys: Of the rows, from :func:`~lightning_kd.cache.row_keys`; None for one without scored
                positions.

        Raises:
            MissingRowError: If there is no row of a key.
            ValueError: If the bytes of a row are not those that were written.
        """
        spans = []
        for place, key in enumerate(keys):
            if key is None:
                continue
            found = self._find(key)
            if found is None:
                raise MissingRowError(place)
            shard = self._shards[found[0]]
            spans.append((shard, *shard.span(found[1])))
        names = next((shard.planes for shard in self._shards if len(shard.keys)), {})
        if not spans:
            return {name: plane[:0].clone() for name, plane in names.items()}
        return {
            name: torch.cat([shard.planes[name][start:end] for shard, start, end in spans])
            for name in names
        }

    def _find(self, key: bytes) -> tuple[int, int] | None:
        first, second = np.frombuffer(key, "<u8")
        at = int(np.searchsorted(self._first, first))
        while at < len(self._first) and self._first[at] == first:
            if self._keys[at, 1] == second:
                shard, row = self._places[at]
                return int(shard), int(row)
            at += 1
        return None
