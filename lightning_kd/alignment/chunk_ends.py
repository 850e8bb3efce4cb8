"""Which tokens decide where chunks of text end."""

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence

_SPACE = ord(" ")


def first_chunks(
    numbers: Sequence[int],
    scored: Sequence[bytes | int],
    may_join: Callable[[int, int | None], bool],
    *,
    before: bytes = b"",
    in_bytes: bool = False,
) -> list[int]:
    """Return the first chunk that each token has a part in: it is in it, or may have decided its end.

    Where the last byte before a token is at no place inside a token of the other side, a chunk has
    ended whatever follows. Where that byte and the token's first are nowhere neighbours inside one,
    it has ended because of the token. Elsewhere text that follows may have moved the end.

    Half a character is written in tokens of its bytes, and a whole one together with the text beside
    it, or behind an added space. So a chunk that ends inside a character is settled when it is known
    whether that one is whole, and one that has ended because of the token behind it, when that is known
    of the character there.

    A token of no bytes that begins a text is an added space. The other side has one, or not, by the
    character that follows, beside which it stands as any space does.

    Args:
        numbers: Chunk of each token; -1 for one in none.
        scored: Bytes of each token, or the special token of the other side that it is.
        may_join: Whether a byte stands before another (None for any) inside a token of the other side.
        before: Text that the first token goes on with.
        in_bytes: Whether the other side writes each byte by itself, whatever stands beside it.

    Example:
        >>> first_chunks([0, 1, 2], [b"a", b"b", b"c"], lambda left, right: left == ord("a"))
        [0, 0, 2]
    """
    first: list[int] = []
    settled, read = 0, 0
    undecided: list[tuple[int, int]] = []  # chunks, each with the bytes that settle those before it
    waiting: int | None = None
    last: int | None = None  # a byte; None for a special token, which nothing can join
    is_added = False
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(before)
    for previous, number, part in zip([-1, *numbers], numbers, scored, strict=False):
        if number > previous >= 0:
            waiting = number
            if last is None or not (is_added or may_join(last, None)):
                undecided.append((number, read))
                waiting = None
        decided = read - (0 if in_bytes else len(decoder.getstate()[0]))
        settled = max([settled, *(chunk for chunk, need in undecided if need <= decided)])
        undecided = [each for each in undecided if each[1] > decided]
        first.append(min(settled, number))
        if part == b"":
            if last is None:
                last, is_added = _SPACE, True
            continue
        if waiting is not None and last is not None:
            if isinstance(part, int):
                undecided.append((waiting, read))
            elif not may_join(last, part[0]):
                undecided.append((waiting, read + 1))
            waiting = None
        is_added = False
        if isinstance(part, int):
            decoder.reset()
            last = None
        else:
            decoder.decode(part)
            read, last = read + len(part), part[-1]
    return first
