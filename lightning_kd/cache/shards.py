"""Shards: numbers at scored positions, row behind row, with keys and checksums of the rows."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_kd.cache.manifest import MEND, ShardEntry, write_file
from lightning_kd.cache.row_keys import KEY_BYTES

Planes = Mapping[str, Tensor]
"""Numbers at each of N positions by name, ``(N, ...)``."""

_LONGEST_HEADER = 2**16
"""Bytes that the header of a shard can have: it names few planes."""

_KEYS, _ENDS, _CHECKSUMS = "row_keys", "row_ends", "row_checksums"
_CACHE = "cache"
"""Entry of the header: what the cache is of, and a checksum of all but its rows."""


class ShardRows:
    """Rows of a shard that is not written yet."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._planes: list[Planes] = []

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], planes: Planes) -> None:
        """Append rows.

        Args:
            keys: Of each row.
            lengths: Scored positions of each row; N together.
            planes: The numbers at these positions, on the CPU; the same names in every call.
        """
        self._keys += keys
        self._lengths += lengths
        self._planes.append(planes)

    def write(self, path: Path, identity: str) -> ShardEntry:
        """Write the shard; the file is complete or not there.

        Args:
            path: Its file.
            identity: Of the cache.

        Raises:
            OSError: If it cannot be written.
        """
        names = sorted(self._planes[0]) if self._planes else []
        planes = {
            name: torch.cat([some[name] for some in self._planes]).contiguous() for name in names
        }
        ends = np.cumsum(self._lengths, dtype=np.int64)
        raw, starts = _raw(planes), [0, *ends.tolist()]
        checksums = [_checksum(raw, *span) for span in zip(starts, ends.tolist(), strict=False)]
        index = {
            _KEYS: torch.tensor(np.frombuffer(b"".join(self._keys), np.uint8)).view(-1, KEY_BYTES)
            if self._keys
            else torch.empty(0, KEY_BYTES, dtype=torch.uint8),
            _ENDS: torch.from_numpy(ends),
            _CHECKSUMS: torch.tensor(checksums, dtype=torch.int64),
        }
        # One entry: several would come in any order.
        content = save({**planes, **index}, {_CACHE: f"{identity} {_index_of(planes, index)}"})
        write_file(path, content)
        tokens = int(sum(self._lengths))
        checksum = _index_checksum(_header(content), index)
        return ShardEntry(len(self._keys), tokens, len(content), checksum)


class Shard:
    """A shard on disk, memory-mapped.

    Args:
        path: Its file.
        identity: Of its cache.
        entry: What the manifest says of it. Defaults to what the file says itself.

    Raises:
        ValueError: If the file is missing, cut short, of another cache, or its index has other bytes
            than were written.
    """

    def __init__(self, path: Path, identity: str, entry: ShardEntry | None = None) -> None:
        self.path = path
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ValueError(f"{path} is missing; the same lightning-kd cache writes it again")
        if entry is not None and size != entry.size:
            raise ValueError(
                f"{path} has {size:,} bytes and was written with {entry.size:,}; {MEND}"
            )
        try:
            # Its tensors are views of the mapped file: nothing is read yet.
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get(_CACHE, "")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); {MEND}") from error
        index = {name: tensors.pop(name, torch.empty(0)) for name in (_KEYS, _ENDS, _CHECKSUMS)}
        with path.open("rb") as content:
            checksum = _index_checksum(
                _header(content.read(int(min(size, _LONGEST_HEADER)))), index
            )
        self.planes: Planes = dict(sorted(tensors.items()))
        if entry is not None and checksum != entry.index_checksum:
            raise ValueError(self._damaged("its index of rows"))
        of, _, layout = said.partition(" ")
        if of != identity:
            raise ValueError(
                f"{path} is of another cache, by another teacher, of other data or with other options; "
                f"{MEND}"
            )
        if layout != _index_of(self.planes, index):
            raise ValueError(self._damaged("its index of rows"))
        self.keys = index[_KEYS].numpy()
        self.ends = index[_ENDS].numpy()
        self._checksums = index[_CHECKSUMS].numpy()
        tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.entry = ShardEntry(len(self.ends), tokens, size, checksum)
        if any(len(plane) != tokens for plane in self.planes.values()):
            raise ValueError(self._damaged("its header"))
        self._raw = _raw(self.planes)
        self._checked = np.zeros(len(self.ends), dtype=bool)

    def span(self, row: int) -> tuple[int, int]:
        """Return the first position of a row and the one behind its last; its bytes are compared once.

        Raises:
            ValueError: If they are not those that were written.
        """
        start, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        if not self._checked[row]:
            if _checksum(self._raw, start, end) != self._checksums[row]:
                raise ValueError(self._damaged(f"row {row}"))
            self._checked[row] = True
        return start, end

    def check_rows(self) -> None:
        """Compare the bytes of every row.

        Raises:
            ValueError: If they are not those that were written.
        """
        for row in range(len(self.ends)):
            self.span(row)

    def _damaged(self, what: str) -> str:
        return (
            f"the bytes of {self.path} are not those that were written ({what}): the disk, or a copy "
            f"of the file, has changed them; {MEND}"
        )


def _raw(planes: Planes) -> list[np.ndarray]:
    """Return the bytes of each position, ``(N, stride)``, in the order of the planes' names."""
    return [
        plane.reshape(len(plane), -1).view(torch.uint8).numpy()
        for _, plane in sorted(planes.items())
        if len(plane)
    ]


def _checksum(raw: Sequence[np.ndarray], start: int, end: int) -> int:
    checksum = 0
    for plane in raw:
        checksum = zlib.crc32(plane[start:end].data, checksum)
    return checksum


def _header(content: bytes) -> bytes:
    """Return the length and the JSON that a file of safetensors begins with."""
    return content[: 8 + int.from_bytes(content[:8], "little")]


def _index_of(planes: Planes, index: Planes) -> str:
    """Return a checksum of all of a shard but its rows, which stands in its header."""
    layout = [[n, str(p.dtype), *p.shape[1:]] for n, p in sorted(planes.items())]
    return f"{_index_checksum(json.dumps(layout).encode(), index):08x}"


def _index_checksum(header: bytes, index: Planes) -> int:
    checksum = zlib.crc32(header)
    for name in (_KEYS, _ENDS, _CHECKSUMS):
        checksum = zlib.crc32(index[name].contiguous().numpy().tobytes(), checksum)
    return checksum
