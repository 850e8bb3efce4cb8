"""Loaders that count what was consumed, so that a run can be resumed exactly."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_kd.data.collate import Collator
from lightning_kd.data.encoding import Example
from lightning_kd.seeding import derive_seed
from lightning_kd.types import FILLER_ROW, Batch

Key = tuple[int, int, int, int]
"""Sample number and row number as the batch shows them, row that is read, pass over the data."""


class Rows(Protocol):
    """A data set, one example at a time."""

    def __len__(self) -> int:
        """Number of rows; it does not change."""
        ...

    def example(self, row: int, pass_: int) -> Example:
        """The example of a row; it may differ from pass to pass."""
        ...


@dataclass(frozen=True)
class RolloutPlan:
    """How training comes back to what was written on the way.

    Attributes:
        micro_batches: Of a window, on each rank: what is written at once.
        passes: How often each window is trained on before the next.
        group_size: Samples of each prompt, one after the other.

    Raises:
        ValueError: If a value is not 1 or more.
    """

    micro_batches: int = 1
    passes: int = 1
    group_size: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("micro_batches", "passes", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def fresh(self, position: int) -> int:
        """Which of the micro-batches that differ stands at a position of the run.

        Example:
            >>> plan = RolloutPlan(micro_batches=2, passes=2)
            >>> [plan.fresh(position) for position in range(8)]
            [0, 1, 0, 1, 2, 3, 2, 3]
        """
        window, within = divmod(position, self.micro_batches * self.passes)
        return window * self.micro_batches + within % self.micro_batches


class _Examples(Dataset[tuple[int, int, Example]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, key: Any) -> tuple[int, int, Example]:
        sample, number, row, pass_ = key
        return sample, number, self.rows.example(row, pass_)


class TrainingLoader:
    r"""An endless stream of shuffled passes, cut into micro-batches.

    Sample :math:`s` of the run is row :math:`\pi_k(s \bmod N)` of pass :math:`k = s \div N`, with a
    permutation :math:`\pi_k` that only the seed and :math:`k` decide. A micro-batch takes the next
    ``batch_size`` samples on every rank. A plan may repeat windows of micro-batches, and take a row
    for several samples in a row. So every pass visits every row once, no micro-batch is
    short, and the rows of an optimizer step do not depend on how many ranks or micro-batches share
    it. For Lightning the run is one long epoch.

    Args:
        rows: The data.
        collate: Makes a batch.
        batch_size: Rows of a micro-batch on one rank.
        micro_batches: How many there are in the whole run, on each rank.
        seed: Decides the order.
        rank: This process.
        world_size: All of them.
        num_workers: Processes that prepare batches ahead; they do not change the stream.
        plan: Windows that are passed over several times, groups of samples of one row.
        files: What the rows were read from, and a digest of each: a resumed run must find the same.

    Example:
        >>> class Letters:
        ...     def __len__(self):
        ...         return 3
        ...     def example(self, row, pass_):
        ...         return Example([row])
        >>> loader = TrainingLoader(Letters(), Collator(0), batch_size=2, micro_batches=3, seed=0)
        >>> stream = [row for batch in loader for row in batch["row"].tolist()]
        >>> sorted(stream[:3]), sorted(stream[3:])
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(
        self,
        rows: Rows,
        collate: Collator,
        *,
        batch_size: int,
        micro_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        plan: RolloutPlan | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.plan = plan or RolloutPlan()
        self.files = dict(files or {})
        self.rows, self.collate, self.num_workers = rows, collate, num_workers
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.position = 0

    def __len__(self) -> int:
        """Micro-batches of the whole run; Lightning takes it for the epoch's."""
        return self.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        """Go on after the last batch that was handed out."""
        for batch in _loader(self.rows, self._keys(), self.collate, self.num_workers):
            # Counted before it is handed out: whoever has the batch sees it as consumed.
            self.position += 1
            yield batch

    def window(self, index: int) -> list[Batch]:
        """The micro-batches of a window on this rank, before anything is written in them."""
        numbers = range(index * self.plan.micro_batches, (index + 1) * self.plan.micro_batches)
        examples = _Examples(self.rows)
        return [self.collate([examples[key] for key in self._samples(n, {})]) for n in numbers]

    def window_of(self, batch: Batch) -> tuple[int, int]:
        """The window a batch of this loader is in, and its place there."""
        number = int(batch["sample"][0]) // (self.batch_size * self.world_size)
        return divmod(number, self.plan.micro_batches)

    @property
    def ends_window(self) -> bool:
        """Is the batch that was handed out last the last of its window, in its last pass?"""
        return self.position % (self.plan.micro_batches * self.plan.passes) == 0

    def state_dict(self) -> dict[str, Any]:
        """How far the run is, in samples of all ranks, and what the order depends on."""
        of_all_ranks = self.batch_size * self.world_size
        return {
            "samples": self.position * of_all_ranks,
            "rows": len(self.rows),
            "seed": self.seed,
            "passes": self.plan.passes,
            "group_size": self.plan.group_size,
            # How long a window is only matters for the order where it comes again.
            "window": self.plan.micro_batches * of_all_ranks if self.plan.passes > 1 else 0,
            "files": self.files,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped, on any number of ranks.

        Raises:
            ValueError: If the state is another loader's, the data or the seed is another one, a
                file has changed, or the samples do not fill whole micro-batches.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the checkpoint holds a loader's state with {sorted(state)}, this one needs "
                f"{sorted(self.state_dict())}: it was written with another data loader; start anew "
                "from the exported student"
            )
        self._compare_files(state["files"])
        for what in ("rows", "seed", "passes", "group_size", "window"):
            if state[what] != self.state_dict()[what]:
                raise ValueError(
                    f"the checkpoint was written with {what} {state[what]}, this run has "
                    f"{self.state_dict()[what]}: resume with the same data, seed and rollouts, or "
                    "start anew from the exported student"
                )
        self.position, rest = divmod(state["samples"], self.batch_size * self.world_size)
        if rest:
            raise ValueError(
                f"the checkpoint is at sample {state['samples']}, which batch_size "
                f"{self.batch_size} on {self.world_size} processes does not divide"
            )

    def _compare_files(self, before: Mapping[str, str]) -> None:
        """A file may have another name, as long as what is in it, and their order, is the same."""
        if list(before.values()) == list(self.files.values()):
            return
        names = sorted({*before, *self.files})
        changed = [n for n in names if before.get(n) != self.files.get(n)] or names
        raise ValueError(
            f"the data has changed since the checkpoint was written: {', '.join(changed)}. Resume "
            "with the files as they were, or start anew from the exported student"
        )

    def _keys(self) -> Iterator[list[Key]]:
        orders: dict[int, list[int]] = {}
        for position in range(self.position, self.micro_batches):
            yield self._samples(self.plan.fresh(position), orders)

    def _samples(self, micro_batch: int, orders: dict[int, list[int]]) -> list[Key]:
        """What a micro-batch reads; ``orders`` keeps the permutations that are in use."""
        first = (micro_batch * self.world_size + self.rank) * self.batch_size
        keys = []
        for sample in range(first, first + self.batch_size):
            pass_, place = divmod(sample // self.plan.group_size, len(self.rows))
            if pass_ not in orders:
                for old in [k for k in orders if k < pass_ - 1]:
                    del orders[old]
                orders[pass_] = self._permutation(pass_)
            row = orders[pass_][place]
            keys.append((sample, row, row, pass_))
        return keys

    def _permutation(self, pass_: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", pass_))
        order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
        return order


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
    ) -> None:
        self.rows, self.collate, self.num_workers = rows, collate, num_workers
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-len(self.rows) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches."""
        yield from _loader(self.rows, self._keys(), self.collate, self.num_workers)

    def _keys(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            numbers = range(first, first + self.batch_size)
            real = [n for n in numbers if n < len(self.rows)]
            # A single process has no one to keep in step with: its last batch is simply shorter.
            fill = self.batch_size - len(real) if self.world_size > 1 else 0
            yield [(n, n, n, 0) for n in real] + [(FILLER_ROW, FILLER_ROW, 0, 0)] * fill


def _loader(
    rows: Rows, keys: Iterator[list[Key]], collate: Collator, num_workers: int
) -> DataLoader[Batch]:
    examples: Any = _Examples(rows)  # the collator turns its items into a Batch
    return DataLoader(
        examples,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own it draws from the global generator each time it starts, and
        # training would depend on how often there was validation.
        generator=torch.Generator(),
    )
