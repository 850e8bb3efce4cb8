"""Keys of rows: what was read, and where it is scored."""

import hashlib

import numpy as np

from lightning_kd.batch import Batch
from lightning_kd.scoring import ScoredPositions

KEY_BYTES = 16


def row_keys(batch: Batch, positions: ScoredPositions) -> list[bytes | None]:
    """Return a hash of each row's token ids and scored positions, whatever its padding and number.

    Args:
        batch: The rows.
        positions: Their scored positions.

    Returns:
        :data:`KEY_BYTES` bytes for each row; None for one of which nothing is scored.

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
    return [_key(*row) if row[2].any() else None for row in zip(ids, real, scored, strict=True)]


def _key(ids: np.ndarray, real: np.ndarray, scored: np.ndarray) -> bytes:
    own = ids[real].astype("<i8")
    hashed = hashlib.blake2b(own.tobytes(), digest_size=KEY_BYTES)
    hashed.update(np.packbits(scored[real]).tobytes())
    return hashed.digest()
