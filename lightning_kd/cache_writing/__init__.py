"""Writing of caches: what the teacher of a method says about the texts of its data."""

from lightning_kd.cache_writing.options import CachedSplit, CacheOptions
from lightning_kd.cache_writing.write import write_cache

__all__ = ["CacheOptions", "CachedSplit", "write_cache"]
