"""Time and bytes a token of reading a cache, in batches of shuffled rows.

    python -m tests.benchmarks.cache_reading

Rows of 200 scored tokens, 32 in a batch. The first pass compares every byte with its checksum; later
ones do not. The numbers are of files in the page cache.
"""

import tempfile
import time
from pathlib import Path

import torch

from lightning_kd.batch import Batch
from lightning_kd.cache import CacheReader, CacheWriter, ShardRows, row_keys
from lightning_kd.scoring import ScoredPositions

ROWS, LENGTH, BATCH, SHARDS = 1024, 200, 32, 4
KINDS = {
    "hidden, H = 64, float32": {"states.0": ((64,), torch.float32)},
    "hidden, H = 512, bfloat16": {"states.0": ((512,), torch.bfloat16)},
    "top_k, k = 64": {
        "token_ids": ((64,), torch.int32),
        "log_probs": ((64,), torch.float32),
        "label_log_probs": ((), torch.float32),
        "tail.0": ((), torch.float32),
    },
}


def batches() -> list[tuple[Batch, ScoredPositions]]:
    """Batches of random rows, prompts of 4 tokens."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for start in range(0, ROWS, BATCH):
        ids = torch.randint(2, 30_000, (BATCH, LENGTH + 4), generator=draws)
        labels = ids.masked_fill(torch.arange(LENGTH + 4) < 4, -100)
        batch: Batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "row": torch.arange(start, start + BATCH),
        }
        made.append((batch, ScoredPositions.from_labels(labels)))
    return made


def write(place: Path, planes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Write a cache of ones."""
    with CacheWriter(place, {}, SHARDS) as writer:
        every = batches()
        for number in range(SHARDS):
            rows = ShardRows()
            for batch, positions in every[number::SHARDS]:
                count = len(positions.targets)
                made = {n: torch.ones(count, *shape).to(t) for n, (shape, t) in planes.items()}
                keys = [key for key in row_keys(batch, positions) if key is not None]
                rows.add(keys, [LENGTH] * BATCH, made)
            writer.write(number, rows)
        writer.finish({})


def read(
    reader: CacheReader, order: list[int], every: list[tuple[Batch, ScoredPositions]]
) -> float:
    """Return microseconds a token of a pass, keys of the rows included."""
    started = time.perf_counter()
    for number in order:
        reader.planes_of(row_keys(*every[number]))
    return (time.perf_counter() - started) / (ROWS * LENGTH) * 1e6


def main() -> None:
    """Print a table."""
    every = batches()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1)).tolist()
    print(f"{'kind':28} {'bytes a token':>14} {'first pass':>12} {'later passes':>13}")
    for name, planes in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "cache", planes)
            reader = CacheReader(Path(folder) / "cache")
            reader.open()
            size = sum(shard.size for shard in reader.manifest.shards) / reader.manifest.tokens
            first = read(reader, order, every)
            later = min(read(reader, order, every) for _ in range(5))
            print(f"{name:28} {size:14,.1f} {first:9.3f} us {later:10.3f} us")


if __name__ == "__main__":
    main()
