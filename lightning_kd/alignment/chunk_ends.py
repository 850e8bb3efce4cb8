"""Which tokens decide where chunks of text end."""

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from itertools import pairwise


def first_chunks(
    numbers: Sequence[int],
    scored: Sequence[bytes | int],
    may_join: Callable[[int, int | None], bool],
    *,
    before: bytes = b"",
) -> list[int]:
    """Return the first chunk that each token has a part in: it is in it, or may have decided its end.

    Where the last byte before a token is at no place inside a token of the other side, a chunk has
    ended whatever follows. Where that byte and the token's first are nowhere neighbours inside one,
    it has ended because of the token. Elsewhere text that follows may have moved the end.

    Half a character is written in tokens of its bytes, and a whole one together with the text beside
    it. So a chunk that ends inside a character is settled when it is known whether that one is whole,
    and one that has ended because of the token behind it, when that is known of the character there.
    Where no two bytes of the text are neighbours inside a token, it is cut between all of them.

    Args:
        numbers: Chunk of each token; -1 for one in none.
        scored: Bytes of each token, or the special token of the other side that it is.
        may_join: Whether a byte stands before another (None for any) inside a token of the other side.
        before: Text that the first token goes on with.

    Example:
        >>> first_chunks([0, 1, 2], [b"a", b"b", b"c"], lambda left, right: left == ord("a"))
        [0, 0, 2]
    """
    first: list[int] = []
    settled, read = 0, 0
    undecided: list[tuple[int, int]] = []  # chunks, each with the bytes that settle those before it
    waiting: int | None = None
    last: int | None = None  # a byte; None for a special token, which nothing can join
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(before)
    loose = _may_be_joined(before, may_join)
    for previous, number, part in zip([-1, *numbers], numbers, scored, strict=False):
        if number > previous >= 0:
            waiting = number
            if last is None or not may_join(last, None):
                undecided.append((number, read))
                waiting = None
        decided = read - (len(decoder.getstate()[0]) if loose else 0)
        settled = max([settled, *(chunk for chunk, need in undecided if need <= decided)])
        undecided = [each for each in undecided if each[1] > decided]
        first.append(min(settled, number))
        if part == b"":
            continue
        if waiting is not None and last is not None:
            if isinstance(part, int):
                undecided.append((waiting, read))
            elif not may_join(last, part[0]):
                undecided.append((waiting, read + 1))
            waiting = None
        if isinstance(part, int):
            decoder.reset()
            last, loose, before = None, False, b""
        else:
            decoder.decode(part)
            loose = loose or _may_be_joined(before + part, may_join)
            read, last, before = read + len(part), part[-1], part[-1:]
    return first


def _may_be_joined(text: bytes, may_join: Callable[[int, int | None], bool]) -> bool:
    return any(may_join(left, right) for left, right in pairwise(text))
