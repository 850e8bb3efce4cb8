"""The micro-batches of a window, which are trained on together or several times."""

from collections.abc import Iterator, Sequence
from typing import overload

from lightning_kd.batch import Batch, copy_of


class Window(Sequence[Batch]):
    """The micro-batches of a window on this rank: each is collated once, at its first use.

    Each access returns a copy, so that a callback that changes the batch it is given changes neither
    the window nor the next pass over it.

    Args:
        number: Number of the window in the run.
        size: Number of its micro-batches.
        prepared: Yields them in their order, and then those of later windows.

    Example:
        >>> window = Window(0, 2, iter([{"row": 0}, {"row": 1}, {"row": 2}]))
        >>> window[1], list(window)
        ({'row': 1}, [{'row': 0}, {'row': 1}])
    """

    def __init__(self, number: int, size: int, prepared: Iterator[Batch]) -> None:
        self.number = number
        self._size, self._prepared = size, prepared
        self._ready: list[Batch] = []

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return self._size

    @overload
    def __getitem__(self, place: int) -> Batch: ...

    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...

    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        """Return a micro-batch, or several; those that come before are made as well."""
        if isinstance(place, slice):
            return [self[each] for each in range(self._size)[place]]
        place = range(self._size)[place]
        while len(self._ready) <= place:
            self._ready.append(next(self._prepared))
        return copy_of(self._ready[place])
