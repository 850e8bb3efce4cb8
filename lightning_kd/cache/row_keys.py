"""Keys of rows: what was read, and where it is scored."""

import hashlib
import json
from collections.abc import Collection

import numpy as np

from lightning_kd.batch import Batch
from lightning_kd.scoring import ScoredPositions

KEY_BYTES = 16


def row_keys(
    batch: Batch, positions: ScoredPositions, columns: Collection[str] = ()
) -> list[bytes | None]:
    """Return a hash of each row's token ids and scored positions, whatever its padding and number.

    Args:
        batch: The rows.
        positions: Their scored positions.
        columns: Further columns of the data that rows are known by.

    Raises:
        ValueError: If the rows have no such column.

    Returns:
        16 bytes for each row; None for one of which nothing is scored.

    Example:
        >>> import torch
        >>> ids, mask = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> batch = {"input_ids": ids, "attention_mask": mask}
        >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 6, 7], [-100, -100, -100]]))
        >>> [None if key is None else key.hex() for key in row_keys(batch, scored)]
        ['cd5d66f93251a953290a5f6f694eb89f', None]
    """
    ids = batch["input_ids"].cpu().numpy()
    real = batch["attention_mask"].cpu().numpy().astype(bool)
    scored = positions.mask.cpu().numpy()
    further = _values(batch, columns, len(ids))
    rows = zip(ids, real, scored, further, strict=True)
    return [_key(*row) if row[2].any() else None for row in rows]


def _values(batch: Batch, columns: Collection[str], rows: int) -> list[bytes]:
    """Return what the columns say of each row; nothing without columns."""
    if not columns:
        return [b""] * rows
    extra = batch.get("extra", {})
    for name in columns:
        if name not in extra:
            raise ValueError(
                f"the rows have no column {name!r}, which the teacher reads and a cache knows its "
                f"rows by; name it in data.extra_columns (there are {sorted(extra)})"
            )
    names = sorted(columns)
    values = zip(*(extra[name] for name in names), strict=True)
    return [json.dumps(row, sort_keys=True, default=repr).encode() for row in values]


def _key(ids: np.ndarray, real: np.ndarray, scored: np.ndarray, further: bytes) -> bytes:
    own = ids[real].astype("<i8")
    hashed = hashlib.blake2b(own.tobytes(), digest_size=KEY_BYTES)
    hashed.update(np.packbits(scored[real]).tobytes())
    hashed.update(further)
    return hashed.digest()
