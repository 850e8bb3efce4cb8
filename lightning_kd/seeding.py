"""Every random decision comes from a seed and counters, so a resumed run repeats it."""

import hashlib
import os


def run_seed() -> int:
    """The seed of the run: what Lightning's ``seed_everything`` was given, 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that belongs to ``parts`` alone.

    Example:
        >>> derive_seed(0, "shuffle", 1) == derive_seed(0, "shuffle", 1)
        True
        >>> derive_seed(0, "shuffle", 1) == derive_seed(0, "shuffle", 2)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
