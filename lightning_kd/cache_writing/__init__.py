"""Writing of caches: what the teacher of a method says about the texts of its data."""

from lightning_kd.cache_writing.options import CachedSplit, CacheOptions
from lightning_kd.cache_writing.write import check_method, write_cache

__all__ = ["CacheOptions", "CachedSplit", "check_method", "write_cache"]
