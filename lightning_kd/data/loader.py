"""A loader that counts consumed samples, so that a run can be resumed exactly."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_kd.batch import Batch
from lightning_kd.data.collate import Collator
from lightning_kd.data.plan import Epochs, RolloutPlan
from lightning_kd.data.window import Window
from lightning_kd.data.workers import WORKER_TIMEOUT, Key, Rows, prepared_batches
from lightning_kd.devices import values_of
from lightning_kd.seeding import derive_seed

Order = NDArray[np.int64]
"""The rows of a pass: a tensor of them would be several times slower to read one by one."""


class TrainingLoader:
    r"""A stream of shuffled passes over the data, cut into micro-batches and epochs.

    Sample :math:`s` of the run is row :math:`\pi_k(s \bmod N)` of pass :math:`k = s \div N`, with a
    permutation :math:`\pi_k` that only the seed and :math:`k` decide. A micro-batch takes the next
    ``batch_size`` samples on every rank. A plan may repeat windows of micro-batches, and take a row
    for several samples in a row. So every pass visits every row once, no micro-batch is
    short, and the rows of an optimizer step do not depend on how many ranks or micro-batches share
    it. An epoch ends with the window in which its pass is complete (:class:`Epochs`); the next goes
    on behind it.

    Args:
        rows: The data.
        collate: Makes a batch.
        batch_size: Rows of a micro-batch on one rank.
        seed: Decides the order.
        rank: This process.
        world_size: All of them.
        num_workers: Processes that prepare batches ahead; they do not change the stream.
        worker_timeout: Longest wait for a batch of theirs, in seconds.
        plan: Windows that are passed over several times, groups of samples of one row.
        files: What the rows were read from, and a digest of each: a resumed run must find the same.

    Attributes:
        position: Micro-batches of the run, on each rank, up to the last that was handed out.
        epoch: The epoch that is iterated over.
        end: The position at which it ends.

    Example:
        >>> from lightning_kd.data.encoding import Example
        >>> class Letters:
        ...     def __len__(self):
        ...         return 4
        ...     def example(self, row, pass_):
        ...         return Example([row])
        >>> loader = TrainingLoader(Letters(), Collator(0), batch_size=3, seed=0)
        >>> first = [row for batch in loader for row in batch["row"].tolist()]
        >>> sorted(first[:4]), len(first)
        ([0, 1, 2, 3], 6)
        >>> loader.set_epoch(1)
        >>> second = first[4:] + [row for batch in loader for row in batch["row"].tolist()]
        >>> sorted(second[:4]), len(second)
        ([0, 1, 2, 3], 5)
    """

    def __init__(
        self,
        rows: Rows,
        collate: Collator,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
        plan: RolloutPlan | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.plan = plan or RolloutPlan()
        self.files = dict(files or {})
        self.rows, self.collate = rows, collate
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.samples_per_micro_batch = batch_size * world_size
        self.window_length = self.plan.window
        self.epochs = Epochs(
            len(rows) * self.plan.group_size, self.plan.micro_batches * self.samples_per_micro_batch
        )
        self._window: Window | None = None
        self._next_window: Window | None = None
        self._prepared: Iterator[Batch] = iter(())
        self.position = 0
        self.set_epoch(0)

    @property
    def dataset(self) -> Rows:
        """The rows, whose number a search for a batch size does not exceed."""
        return self.rows

    def start_of(self, epoch: int) -> int:
        """Return the position at which an epoch begins."""
        return self.epochs.start(epoch) * self.plan.window

    def epoch_of(self, position: int) -> int:
        """Return the epoch of the micro-batch that follows a position."""
        return self.epochs.of(position // self.plan.window)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless the position is in it, or at its end."""
        self.epoch = epoch
        start, self.end = self.start_of(epoch), self.start_of(epoch + 1)
        if not start <= self.position <= self.end:
            self.position = start

    def length_of(self, epoch: int) -> int:
        """Return the micro-batches of an epoch, on each rank."""
        return self.start_of(epoch + 1) - self.start_of(epoch)

    def __len__(self) -> int:
        """Return the micro-batches of the epoch, on each rank."""
        return self.length_of(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches after the last one, to the end of the epoch."""
        workers = (self.num_workers, self.worker_timeout)
        self._window = self._next_window = None
        with closing(prepared_batches(self.rows, self._keys(), self.collate, *workers)) as prepared:
            self._prepared = prepared
            for position in range(self.position, self.end):
                self._window, place = self._place(position)
                batch = self._window[place]
                # Counted before it is handed out: whoever has the batch sees it as consumed.
                self.position += 1
                yield batch

    def following(self) -> Batch | None:
        """Return the micro-batch that will be handed out next, before it counts as consumed.

        Returns:
            None at the end of an epoch.
        """
        if self.position >= self.end:
            return None
        window, place = self._place(self.position)
        if window is not self._window:
            self._next_window = window
        return window[place]

    def window_of(self, batch: Batch) -> tuple[Window, int]:
        """Return the window of the batch that was handed out last, and its place there.

        Raises:
            ValueError: If the batch is of another window.
        """
        micro_batch = values_of(batch["sample"])[0] // self.samples_per_micro_batch
        number, place = divmod(micro_batch, self.plan.micro_batches)
        if self._window is None or self._window.number != number:
            at = "none" if self._window is None else f"window {self._window.number}"
            raise ValueError(
                f"the batch is of window {number} and the loader is at {at}: it knows the window of "
                "the batch that it has handed out last"
            )
        return self._window, place

    @property
    def ends_window(self) -> bool:
        """Whether the last batch ended its window, in its last pass."""
        return self.position % self.plan.window == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in samples of all ranks, and what the order depends on."""
        return {
            "samples": self.position * self.samples_per_micro_batch,
            "rows": len(self.rows),
            "seed": self.seed,
            "passes": self.plan.passes,
            "group_size": self.plan.group_size,
            "window": self.epochs.window,
            "files": self.files,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped, on any number of ranks.

        Raises:
            ValueError: If the state is another loader's, the data or the seed is another one, a
                file has changed, or steps or windows have another number of samples.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(
                f"the checkpoint holds a loader's state with {sorted(state)}, this one needs "
                f"{sorted(own)}: it was written with another data loader; start anew "
                "from the exported student"
            )
        self._compare_files(state["files"])
        for what in ("rows", "seed", "passes", "group_size"):
            if state[what] != own[what]:
                raise ValueError(
                    f"the checkpoint was written with {what} {state[what]}, this run has "
                    f"{own[what]}: resume with the same data, seed and rollouts, or "
                    "start anew from the exported student"
                )
        # Earlier versions wrote 0 where windows were not repeated.
        if state["window"] not in {0, own["window"]}:
            raise ValueError(
                f"the checkpoint was written with {state['window']} samples in an optimizer step or "
                f"window of rollouts, this run has {own['window']}: keep batch_size x processes x "
                "accumulate_grad_batches (x steps_per_window) as it was"
            )
        self.position, rest = divmod(state["samples"], self.samples_per_micro_batch)
        if rest:
            raise ValueError(
                f"the checkpoint is at sample {state['samples']}, which batch_size "
                f"{self.batch_size} on {self.world_size} processes does not divide"
            )
        self.set_epoch(self.epoch_of(self.position))

    def _compare_files(self, before: Mapping[str, str]) -> None:
        """Compare the contents of files, in their order; names may differ."""
        if list(before.values()) == list(self.files.values()):
            return
        names = sorted({*before, *self.files})
        changed = [n for n in names if before.get(n) != self.files.get(n)] or names
        raise ValueError(
            f"the data has changed since the checkpoint was written: {', '.join(changed)}. Resume "
            "with the files as they were, or start anew from the exported student"
        )

    def _place(self, position: int) -> tuple[Window, int]:
        """Return the window at a position, and the place of its micro-batch there.

        Windows draw from one iterator, so all of one is drawn before the next begins.
        """
        number, place = self.plan.place(position)
        for known in (self._window, self._next_window):
            if known is not None and known.number == number:
                if known is not self._window:
                    self._next_window = None
                return known, place
        if self._window is not None:
            self._window[-1]
        return Window(number, self.plan.micro_batches, self._prepared), place

    def _keys(self) -> Iterator[list[Key]]:
        """Yield the keys of each micro-batch once, from the start of the present window."""
        orders: dict[int, Order] = {}
        first, end = self.position // self.plan.window, -(-self.end // self.plan.window)
        for number in range(first * self.plan.micro_batches, end * self.plan.micro_batches):
            yield self._samples(number, orders)

    def _samples(self, micro_batch: int, orders: dict[int, Order]) -> list[Key]:
        """Return the keys of a micro-batch; ``orders`` keeps the permutations that are in use."""
        first = (micro_batch * self.world_size + self.rank) * self.batch_size
        keys = []
        for sample in range(first, first + self.batch_size):
            pass_, place = divmod(sample // self.plan.group_size, len(self.rows))
            if pass_ not in orders:
                for old in [k for k in orders if k < pass_ - 1]:
                    del orders[old]
                orders[pass_] = self._permutation(pass_)
            row = int(orders[pass_][place])
            keys.append((sample, row, row, pass_))
        return keys

    def _permutation(self, pass_: int) -> Order:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", pass_))
        order: Order = torch.randperm(len(self.rows), generator=generator).numpy()
        return order
