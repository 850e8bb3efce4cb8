"""A loader of every row once, for validation, tests and predictions."""

from collections.abc import Iterator

from lightning_kd.batch import FILLER_ROW, Batch
from lightning_kd.data.collate import Collator
from lightning_kd.data.workers import WORKER_TIMEOUT, Key, Rows, prepared_batches


class EvaluationLoader:
    """Every row once, in order, split over ranks without duplicates.

    All ranks get the same number of batches, so that collectives stay in step; where rows run out
    there is filler, of which nothing is scored.

    Args:
        rows: The data.
        collate: Makes a batch.
        batch_size: Rows of a batch on one rank.
        rank: This process.
        world_size: All of them.
        num_workers: Processes that prepare batches ahead.
        worker_timeout: Longest wait for a batch of theirs, in seconds.
    """

    def __init__(
        self,
        rows: Rows,
        collate: Collator,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-len(self.rows) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches."""
        workers = (self.num_workers, self.worker_timeout)
        yield from prepared_batches(self.rows, self._keys(), self.collate, *workers)

    def _keys(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            numbers = range(first, first + self.batch_size)
            real = [n for n in numbers if n < len(self.rows)]
            # A single process has no one to keep in step with: its last batch is simply shorter.
            fill = self.batch_size - len(real) if self.world_size > 1 else 0
            yield [(n, n, n, 0) for n in real] + [(FILLER_ROW, FILLER_ROW, 0, 0)] * fill
