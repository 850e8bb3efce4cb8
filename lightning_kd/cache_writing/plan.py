"""Plan of a cache: which batches a shard has, and how large all of them are."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class ShardPlan:
    """Division of each process's batches into shards.

    Shard ``group * processes + rank`` has the batches of one process in a group; a group has
    ``batches_per_shard`` batches of each process, of one loader.

    Args:
        batches: Batches of each loader, on each process.
        batches_per_shard: Batches that a process writes into a file.
        processes: All of them.

    Example:
        >>> plan = ShardPlan((5, 2), 2, processes=2)
        >>> plan.shards, plan.group(0, 4), plan.group(1, 0), plan.shard(3, rank=1)
        (8, 2, 3, 7)
    """

    batches: tuple[int, ...]
    batches_per_shard: int
    processes: int

    @classmethod
    def of_size(
        cls, batches: Sequence[int], processes: int, size: int, shard_size: float
    ) -> "ShardPlan":
        """Return the plan whose shards are about of a size.

        Args:
            batches: Batches of each loader, on each process.
            processes: All of them.
            size: Bytes of all shards.
            shard_size: Bytes of one.
        """
        of_batch = size / (sum(batches) * processes)
        return cls(tuple(batches), max(1, int(shard_size / max(1.0, of_batch))), processes)

    @property
    def _groups(self) -> list[int]:
        return [-(-number // self.batches_per_shard) for number in self.batches]

    @property
    def shards(self) -> int:
        """All shards."""
        return sum(self._groups) * self.processes

    def group(self, loader: int, batch: int) -> int:
        """Return the group of a batch."""
        first = [0, *accumulate(self._groups)][loader]
        return first + batch // self.batches_per_shard

    def shard(self, group: int, rank: int) -> int:
        """Return the number of a process's shard in a group."""
        return group * self.processes + rank

    def complete_groups(self, shards: Collection[int]) -> set[int]:
        """Return the groups whose shards are all among those given.

        Only whole groups are left out when a cache is continued: a teacher whose weights are sharded
        answers on all processes or on none.
        """
        return {
            group
            for group in range(sum(self._groups))
            if all(self.shard(group, rank) in shards for rank in range(self.processes))
        }
