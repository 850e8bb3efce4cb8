"""Preparation of batches, in this process or ahead of it in workers."""

import multiprocessing
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_kd.batch import Batch
from lightning_kd.data.collate import Collator
from lightning_kd.data.encoding import Example
from lightning_kd.processes import signals_held, start_worker

Key = tuple[int, int, int, int]
"""Sample number and row number as the batch shows them, row that is read, pass over the data."""

_LAST_WAIT = 10.0
"""Longest time in which a worker process may end, in seconds."""

WORKER_TIMEOUT = 600.0
"""Longest wait for a batch of a worker process, in seconds."""


class Rows(Protocol):
    """A data set, one example at a time."""

    def __len__(self) -> int:
        """Number of rows; it does not change."""
        ...

    def example(self, row: int, pass_: int) -> Example:
        """The example of a row; it may differ from pass to pass."""
        ...


class Examples(Dataset[tuple[int, int, Example]]):
    """The examples of rows, by :data:`Key`."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, key: Any) -> tuple[int, int, Example]:
        """Sample number and row number, and the example."""
        sample, number, row, pass_ = key
        return sample, number, self.rows.example(row, pass_)


def prepared_batches(
    rows: Rows,
    keys: Iterator[list[Key]],
    collate: Collator,
    num_workers: int,
    worker_timeout: float,
) -> Generator[Batch]:
    """Batches of the rows that the keys name, in their order.

    Args:
        rows: The data.
        keys: What each batch reads.
        collate: Makes a batch.
        num_workers: Processes that prepare batches ahead; 0 prepares them here.
        worker_timeout: Longest wait for a batch of theirs, in seconds.

    Raises:
        TimeoutError: If none came in this time.
        RuntimeError: If a process ended.
    """
    # Tensors come from a worker by a file that is asked of it, for ever where it does not answer.
    loader: DataLoader[Any] = DataLoader(
        Examples(rows),
        batch_sampler=keys,
        collate_fn=list,
        num_workers=num_workers,
        timeout=worker_timeout if num_workers else 0,
        worker_init_fn=partial(start_worker, os.getpid()),
        # Without one of its own it draws from the global generator each time it starts, and
        # training would depend on how often there was validation.
        generator=torch.Generator(),
    )
    before = {process.pid for process in multiprocessing.active_children()}
    with signals_held():
        batches = iter(loader)
    workers = [p for p in multiprocessing.active_children() if p.pid not in before]
    try:
        yield from map(collate, batches)
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        raise TimeoutError(
            f"the {num_workers} data.num_workers have prepared no batch in {worker_timeout:g} s, the "
            "data.worker_timeout: one of them hangs, or reading the rows of a batch takes that long. "
            "Set data.num_workers: 0 to prepare batches in the main process, or raise "
            "data.worker_timeout"
        ) from error
    finally:
        del batches  # which asks the workers to end
        for process in workers:  # an error may keep them; Python waits for them when it ends
            process.terminate()
            process.join(_LAST_WAIT)
            with suppress(RuntimeError):  # torch's, of every worker that is killed
                process.kill()
                process.join(_LAST_WAIT)
