"""Numbers at the scored positions of texts, on disk: written once, memory-mapped by every reader."""

from lightning_kd.cache.manifest import Manifest, read_manifest
from lightning_kd.cache.reader import CacheReader, MissingRowError
from lightning_kd.cache.row_keys import row_keys
from lightning_kd.cache.shards import ShardRows
from lightning_kd.cache.writer import CacheWriter

__all__ = [
    "CacheReader",
    "CacheWriter",
    "Manifest",
    "MissingRowError",
    "ShardRows",
    "read_manifest",
    "row_keys",
]
