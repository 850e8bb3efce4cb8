"""Rows of one tokenizer in the tokens of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_kd.alignment.chunks import Chunks, align
from lightning_kd.alignment.encoder import ByteEncoder
from lightning_kd.batch import TEACHER_END
from lightning_kd.token_bytes import TokenBytes, unknown_tokens
from lightning_kd.tokenization import begun, special_token_frame, tokens_of

_Part = bytes | int
"""Bytes of text, or a special token of the other tokenizer."""

_Sized = tuple[int, int]
"""A token, and its bytes; 1 for a special one."""

_ROLES = ("eos_token", "bos_token", "sep_token", "cls_token", "pad_token")


@dataclass(frozen=True)
class AlignedRow:
    """A row in the tokens of another tokenizer, and what of both is the same text."""

    ids: list[int]
    """The row in the other tokens."""
    start: int
    """Where what is scored begins in them."""
    chunks: Chunks
    """Of the student's scored tokens, and of the others from ``start`` on."""
    since: list[int]
    """First chunk whose extent each of the student's scored tokens has a part in; -1 for none."""


def counterparts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Return the teacher's token for each of the student's special tokens that has one.

    It is that of the same role (EOS, BOS, separator, classifier, padding), or else of the same name; of
    the same name first where the teacher's chat template has it, as where that ends turns with another
    token than EOS. An unknown token, which may stand for any text, has none, also if it is padding.

    Raises:
        ValueError: If the bytes of the student's tokens are not known.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> from lightning_kd.data.tokenizer_training import train_tokenizer
        >>> other = train_tokenizer(["12"], vocab_size=258)
        >>> counterparts(arithmetic_tokenizer(), other), other.pad_token_id, other.eos_token_id
        ({1: 1}, 0, 1)
    """
    theirs = {str(token): number for number, token in _special(teacher).items()}
    unknown = unknown_tokens(student)
    ours = {n: str(token) for n, token in _special(student).items() if n not in unknown}
    named = {number: theirs[name] for number, name in ours.items() if name in theirs}
    found = dict(named)
    for role in reversed(_ROLES):  # what is EOS too is the EOS
        own, other = (getattr(side, f"{role}_id") for side in (student, teacher))
        if own is not None and other is not None and own not in unknown:
            found[own] = other
    template = str(teacher.chat_template or "")
    return found | {number: other for number, other in named.items() if ours[number] in template}


def _special(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, object]:
    added = tokenizer.added_tokens_decoder.items()
    return {n: token for n, token in added if token.special and n != tokenizer.unk_token_id}


class Retokenizer:
    """Rows of one tokenizer, in the tokens of another.

    What is scored of a row is its completion: its bytes are those of the student's tokens, and special
    tokens among them are the other tokenizer's (:func:`counterparts`); one without a counterpart stands
    for no text. What is before it is read as the other tokenizer reads a prompt, and both are
    tokenized so that a token of the other side begins where the completion does.

    Args:
        student: The tokenizer of the rows.
        teacher: The other one.

    Raises:
        ValueError: If the bytes of the tokens of one of them are not known.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._student, self._teacher = student, teacher
        self._known = TokenBytes.of_tokenizer(student)
        self._encoder, self._vocabulary = ByteEncoder(teacher), teacher.get_vocab()
        self._special = counterparts(student, teacher)
        own = self._known.is_special.nonzero()[:, 0].tolist()
        self._without_counterpart = {*own} - self._special.keys()
        pieces = self._known.pieces
        self._refused = {n for n, piece in enumerate(pieces) if piece is None}
        self._refused |= self._without_counterpart
        # A special token is one, and the text behind it may begin with a space of no bytes.
        self._most = [len(piece or b"") or 2 for piece in pieces]
        self._own_frame, self._frame = (special_token_frame(t)[0] for t in (student, teacher))

    @property
    def reads_any_text(self) -> bool:
        """Whether the other tokenizer can write any bytes."""
        return self._encoder.knows_every_byte

    def row(
        self,
        ids: Sequence[int],
        start: int,
        *,
        prompt: str | None = None,
        apart: bool = False,
        generated: bool = False,
        end: str | None = None,
    ) -> AlignedRow:
        """Return a row in the other tokens.

        Args:
            ids: The student's tokens, up to the last scored one.
            start: Place of the first scored one.
            prompt: Text that stands before it; None for what the student's tokens before it say.
            apart: Whether what is scored was tokenized as a text of its own.
            generated: Whether a model has written it: tokens of unknown text, and special ones without
                a counterpart, stand for none then.
            end: Token of the other tokenizer that ends an answer, which the student's EOS stands for
                where nothing else of the completion does; None for its EOS.

        Raises:
            ValueError: If a token's bytes are not known, a special one has no counterpart, the other
                tokenizer cannot write the text, or it has no such token.
        """
        pieces = self._known.of_row(ids, start if apart else None)
        own = [self._special.get(token) for token in ids]
        if end is not None:
            own[start:] = self._ended(ids[start:], own[start:], end)
        begin = self._begin(ids, start)
        checked = slice(begin if prompt is None else start, start if generated else None)
        self._check(ids[checked], pieces[checked])
        completion = _parts(pieces[start:], own[start:])
        if prompt is not None:
            read_whole = tokens_of([prompt], self._teacher)[0]
            self._encoder.check_known(read_whole, prompt)
            before = begun(read_whole, self._frame)
            after = self._encoded(completion, begins=apart)
        else:
            read = _parts(pieces[begin:start], own[begin:start])
            before, after = self._continued(read, completion, apart=apart)
        scored = list(zip(pieces[start:], own[start:], strict=True))
        sizes = [len(piece or b"") if special is None else 1 for piece, special in scored]
        chunks = align(sizes, [size for _, size in after])
        if not before and chunks.count:  # nothing predicts its first token
            chunks = chunks.without_first()
        ids_of_both = [*before, *(token for token, _ in after)]
        return AlignedRow(ids_of_both, len(before), chunks, self._since(chunks.first, scored))

    def most_tokens(
        self, ids: Sequence[int], start: int, *, prompt: str | None = None
    ) -> int | None:
        """Return how many of the other tokens a row has at most, by its bytes, without writing it.

        Returns:
            None where that alone does not tell whether the row can be read.
        """
        read = ids[self._begin(ids, start) if prompt is None else start :]
        unknown = not self._refused.isdisjoint(read) or max(read, default=0) >= len(self._most)
        if unknown or not self.reads_any_text:
            return None
        of_prompt = len(self._frame) + len((prompt or "").encode()) + 1
        return of_prompt + 1 + sum(self._most[token] for token in read)

    def _begin(self, ids: Sequence[int], start: int) -> int:
        """Return where the text of a row begins, behind what its tokenizer puts before one."""
        framed = list(ids[: len(self._own_frame)]) == self._own_frame
        return min(len(self._own_frame), start) if framed else 0

    def _ended(
        self, ids: Sequence[int], own: Sequence[int | None], end: str
    ) -> Sequence[int | None]:
        """Return the counterparts of a completion's tokens, of which an EOS ends a turn."""
        number, eos = self._vocabulary.get(end), self._student.eos_token_id
        if number is None:
            raise ValueError(
                f"{TEACHER_END} is {end!r}, which is no token of the teacher's tokenizer; name one, or "
                "leave the column out"
            )
        if number in own:  # as where a student's template writes it, and an EOS was appended
            return own
        return [number if token == eos else other for token, other in zip(ids, own, strict=True)]

    def _since(
        self, numbers: Sequence[int], scored: Sequence[tuple[bytes | None, int | None]]
    ) -> list[int]:
        """Return the first chunk that each token has a part in: it is in it, or may have ended it.

        Where the last byte before a token is at no place inside a token of the other side, a chunk has
        ended whatever follows. Where that byte and the token's first are nowhere neighbours inside one,
        it has ended because of the token, and for those behind it that is so. Elsewhere text that
        follows may have moved the end.
        """
        since, settled = [], 0
        left: int | None = None  # a special token, or what nothing can join
        waiting: int | None = None
        for place, (piece, special) in enumerate(scored):
            number = numbers[place]
            if place and number > numbers[place - 1] >= 0:
                if left is None or not self._encoder.may_join(left):
                    settled, waiting = number, None
                else:
                    waiting = number
            since.append(min(settled, number))
            if special is None and not piece:
                continue
            if waiting is not None and left is not None:
                if special is not None or not self._encoder.may_join(left, (piece or b"")[0]):
                    settled = waiting
                waiting = None
            left = None if special is not None else (piece or b"")[-1]
        return since

    def _continued(
        self, read: list[_Part], completion: list[_Part], *, apart: bool
    ) -> tuple[list[int], list[_Sized]]:
        """Return what is before the completion, and the completion, as one text unless it is apart."""
        if apart or not (read and isinstance(read[-1], bytes)):
            before, after = self._encoded(read, begins=True), self._encoded(completion, begins=True)
        elif not (completion and isinstance(completion[0], bytes)):
            before, after = (
                self._encoded(read, begins=True),
                self._encoded(completion, begins=False),
            )
        else:
            whole = self._encoder.encode(read[-1] + completion[0])
            sides = self._encoder.split(whole, len(read[-1]))
            left, right = ([(token.id, len(token.bytes)) for token in side] for side in sides)
            before = self._encoded(read[:-1], begins=True) + left
            after = right + self._encoded(completion[1:], begins=True)
        return [*self._frame, *(token for token, _ in before)], after

    def _encoded(self, parts: list[_Part], *, begins: bool) -> list[_Sized]:
        """Return the tokens of bytes and of special tokens, each of which has the size 1."""
        sized: list[_Sized] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                sized.append((part, 1))
                continue
            tokens = self._encoder.encode(part, begins=begins or number > 0)
            sized += [(token.id, len(token.bytes)) for token in tokens]
        return sized

    def _check(self, ids: Sequence[int], pieces: Sequence[bytes | None]) -> None:
        """Refuse tokens that the teacher could not read."""
        for token, piece in zip(ids, pieces, strict=True):
            if piece is None:
                raise ValueError(
                    f"the text of the token {self._named(token)} is not known, so that it cannot be "
                    "read in the teacher's tokens: leave the row out, or take a tokenizer that knows "
                    "every letter of the data"
                )
            if token in self._without_counterpart:
                raise ValueError(
                    f"the special token {self._named(token)} has no counterpart in the teacher's "
                    "tokenizer, so that the teacher would read the row without it: take it out of the "
                    "data's texts, give the teacher's tokenizer a special token of that name, or, "
                    "where a chat template ends answers with it, set data.eos_token to it"
                )

    def _named(self, token: int) -> str:
        return f"{token} ({self._student.convert_ids_to_tokens(token)!r})"


def _parts(pieces: Sequence[bytes | None], own: Sequence[int | None]) -> list[_Part]:
    """Join the bytes between special tokens."""
    parts: list[_Part] = []
    for piece, special in zip(pieces, own, strict=True):
        if special is not None:
            parts.append(special)
        elif piece and parts and isinstance(parts[-1], bytes):
            parts[-1] += piece
        elif piece:
            parts.append(piece)
    return parts
