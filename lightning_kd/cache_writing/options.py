"""Options of the writing of a cache."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_kd.option_checks import is_number
from lightning_kd.teachers.payloads import CacheKind, Payload, make_payload

CachedSplit = Literal["train", "validation", "test"]
"""A part of the data whose rows a teacher is asked about."""


@dataclass(frozen=True)
class CacheOptions:
    """What ``lightning-kd cache`` writes, and where.

    Args:
        dirpath: Directory of the cache. One that is incomplete is continued.
        kind: What is kept at a position: ``hidden``, the states before the output head and the head
            once, which is exact; ``top_k``, the most likely tokens, and the rest
            as one event; or ``sampled``, tokens drawn at random, for the forward KL.
        k: Tokens at a position, for ``top_k``; defaults to 64. For ``sampled``, those that are named
            beside the draws, which are then from the rest; defaults to 0.
        draws: Tokens that are drawn at a position, for ``sampled``. Defaults to 64.
        temperatures: Temperatures of later runs, for ``top_k``. Defaults to 1 alone.
        splits: Splits of the data. A training run needs ``train``, and ``validation`` if it validates.
        shard_megabytes: Size of a file, about; so much may be lost when the writing is killed.

    Raises:
        ValueError: If a value is out of its range.
    """

    dirpath: str
    kind: CacheKind = "hidden"
    k: int | None = None
    draws: int | None = None
    temperatures: list[float] | None = None
    splits: list[CachedSplit] = field(default_factory=lambda: ["train", "validation"])
    shard_megabytes: float = 256.0

    def __post_init__(self) -> None:
        """Check the values."""
        known = get_args(CachedSplit)
        if not self.splits or sorted({*self.splits} & {*known}) != sorted(self.splits):
            raise ValueError(
                f"cache.splits is {self.splits}; name some of {', '.join(known)}, each once"
            )
        for name, given in (("k", self.k), ("draws", self.draws)):
            if given is not None and not is_number(given, whole=True):
                raise ValueError(
                    f"cache.{name} is {given!r}, of type {type(given).__name__}; give a whole number"
                )
        if not self.shard_megabytes > 0:
            raise ValueError(
                f"cache.shard_megabytes is {self.shard_megabytes}; it must be positive"
            )
        self.payload()

    def payload(self) -> Payload:
        """Return the way to keep answers."""
        given = {"k": self.k, "draws": self.draws, "temperatures": self.temperatures}
        return make_payload(self.kind, {n: v for n, v in given.items() if v is not None})
