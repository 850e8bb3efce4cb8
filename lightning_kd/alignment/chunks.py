"""Where two tokenizations of one text meet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunks:
    """Groups of neighbouring tokens on two sides that stand for the same bytes."""

    first: list[int]
    """Number of the chunk of each token of the first side, from 0 on; -1 for one in no chunk."""
    second: list[int]
    """The same of the second side."""
    count: int

    def without_first(self) -> "Chunks":
        """Return the chunks but the first, whose tokens are then in none.

        Example:
            >>> align([1, 2], [1, 1, 1]).without_first()
            Chunks(first=[-1, 0], second=[-1, 0, 0], count=1)
        """
        first, second = (
            [max(number - 1, -1) for number in side] for side in (self.first, self.second)
        )
        return Chunks(first, second, max(self.count - 1, 0))


def align(first: Sequence[int], second: Sequence[int]) -> Chunks:
    """Cut two tokenizations wherever a token ends on both sides, in linear time.

    A token of no bytes (an added space, a special token) meets one of no bytes at the same place on the
    other side; alone, it belongs to what follows it, and at the end of the text to what is before it.

    Args:
        first: Bytes of each token of one tokenization.
        second: The same of another tokenization of the same bytes.

    Raises:
        ValueError: If they are not of equally many bytes.

    Example:
        >>> align([3, 1, 2], [1, 2, 3])
        Chunks(first=[0, 1, 1], second=[0, 0, 1], count=2)
    """
    if sum(first) != sum(second):
        raise ValueError(
            f"one side has {sum(first)} bytes and the other {sum(second)}; give two tokenizations of "
            "one text"
        )
    ends = set(_ends(second))
    cuts = [end for end in _ends(first) if end in ends]
    return Chunks(_numbers(first, cuts), _numbers(second, cuts), len(cuts))


_Place = tuple[int, int]
"""Bytes before a place, and tokens of no bytes between the last of them and it."""


def _ends(sizes: Sequence[int]) -> Iterator[_Place]:
    read = empty = 0
    for size in sizes:
        read, empty = read + size, 0 if size else empty + 1
        yield read, empty


def _numbers(sizes: Sequence[int], cuts: Sequence[_Place]) -> list[int]:
    """Return the chunk of each token: how many cuts there are up to where it begins."""
    numbers, start, passed = [], (0, 0), 0
    for end in _ends(sizes):
        while passed < len(cuts) and cuts[passed] <= start:
            passed += 1
        numbers.append(min(passed, len(cuts) - 1))
        start = end
    return numbers
