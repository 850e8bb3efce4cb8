"""Rows of one tokenizer in the tokens of another."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_kd.alignment.chunk_ends import first_chunks
from lightning_kd.alignment.chunks import Chunks, align
from lightning_kd.alignment.counterparts import counterparts
from lightning_kd.alignment.encoder import ByteEncoder
from lightning_kd.batch import TEACHER_END
from lightning_kd.token_bytes import TokenBytes
from lightning_kd.tokenization import begun, special_token_frame, tokens_of

_Part = bytes | int
"""Bytes of text, or a special token of the other tokenizer."""

_Sized = tuple[int, int]
"""A token, and its bytes; 1 for a special one."""


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


class Retokenizer:
    """Rows of one tokenizer, in the tokens of another.

    What is scored of a row is its completion: its bytes are those of the student's tokens, and special
    tokens among them are the other tokenizer's (:func:`counterparts`). One without a counterpart, which
    a model may have generated, is the letters of its name, with which the text behind it goes on: every
    token is text to the other side. What is before the completion is read as the other tokenizer reads
    a prompt, and both are tokenized so that a token of the other side begins where the completion does.
    Where a tokenizer puts a space before a text, it does so before a completion if both do.

    Args:
        student: The tokenizer of the rows.
        teacher: The other one.

    Raises:
        ValueError: If the bytes of the tokens of one of them are not known.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._student, self._teacher = student, teacher
        self._known = TokenBytes.of_tokenizer(student)
        self._adds_space = bool(self._known.may_begin_with_added_space.any())
        self._encoder, self._ends = ByteEncoder(teacher), teacher.added_tokens_encoder
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
        ended: bool = False,
        end: str | None = None,
    ) -> AlignedRow:
        """Return a row in the other tokens.

        Args:
            ids: The student's tokens, up to the last scored one.
            start: Place of the first scored one.
            prompt: Text that stands before it; None for what the student's tokens before it say.
            apart: Whether what is scored was tokenized as a text of its own.
            generated: Whether a model has written it: tokens of unknown text, and special ones without
                a counterpart, are the letters of their names then.
            ended: Whether the last token is what generation ended with: it ends an answer, as EOS.
            end: Token of the other tokenizer that ends an answer, which the student's EOS stands for
                where nothing else of the completion does; None for what it is mapped to.

        Raises:
            ValueError: If a token's bytes are not known, a special one has no counterpart, the other
                tokenizer cannot write the text, or it has no such token.
        """
        pieces = self._known.of_row(ids, start if apart else None)
        others = [self._special.get(token) for token in ids]
        ends = {self._student.eos_token_id, *(ids[-1:] if ended else ())}
        others[start:] = self._ended(ids[start:], others[start:], ends, end)
        begin = self._begin(ids, start)
        checked = slice(begin if prompt is None else start, start if generated else None)
        self._check(ids[checked], pieces[checked])
        if generated:
            pieces[start:] = self._shown(ids[start:], pieces[start:])
        parts = [
            piece or b"" if own is None else own for piece, own in zip(pieces, others, strict=True)
        ]
        scored, completion = parts[start:], _joined(parts[start:])
        goes_on_with = b""
        if prompt is not None:
            read_whole = tokens_of([prompt], self._teacher)[0]
            self._encoder.check_known(read_whole, prompt)
            before = begun(read_whole, self._frame)
            alone = before == self._frame
            after = self._encoded(completion, begins=apart and (alone or self._adds_space))
        else:
            read = _joined(parts[begin:start])
            before, after = self._continued(read, completion, apart=apart)
            if read and isinstance(read[-1], bytes) and not apart:
                goes_on_with = read[-1]
        sizes = [1 if isinstance(part, int) else len(part) for part in scored]
        chunks = align(sizes, [size for _, size in after])
        if not before and chunks.count:  # nothing predicts its first token
            chunks = chunks.without_first()
        ids_of_both = [*before, *(token for token, _ in after)]
        since = first_chunks(
            chunks.first,
            scored,
            self._encoder.may_join,
            before=goes_on_with,
            in_bytes=self._encoder.writes_bytes_alone,
        )
        return AlignedRow(ids_of_both, len(before), chunks, since)

    def most_tokens(
        self, ids: Sequence[int], start: int, *, prompt: str | None = None, end: str | None = None
    ) -> int | None:
        """Return how many of the other tokens a row has at most, by its bytes, without writing it.

        Returns:
            None where that alone does not tell whether the row can be read.
        """
        read = ids[self._begin(ids, start) if prompt is None else start :]
        unknown = not self._refused.isdisjoint(read) or max(read, default=0) >= len(self._most)
        no_end = end is not None and end not in self._ends
        if unknown or no_end or not self.reads_any_text:
            return None
        of_prompt = len(self._frame) + self._encoder.most_bytes(prompt or "")
        return of_prompt + 2 + sum(self._most[token] for token in read)

    def _begin(self, ids: Sequence[int], start: int) -> int:
        """Return where the text of a row begins, behind what its tokenizer puts before one."""
        framed = list(ids[: len(self._own_frame)]) == self._own_frame
        return min(len(self._own_frame), start) if framed else 0

    def _ended(
        self,
        ids: Sequence[int],
        others: Sequence[int | None],
        ends: Collection[int | None],
        end: str | None,
    ) -> Sequence[int | None]:
        """Return the counterparts of tokens, of which some end a turn."""
        number = self._special.get(self._student.eos_token_id)
        if end is not None:
            number = self._ends.get(end)
            if number is None:
                raise ValueError(
                    f"{TEACHER_END} is {end!r}, which is no special or added token of the "
                    "teacher's tokenizer; name one, or leave the column out"
                )
        # As where a student's template writes it, and an EOS was appended.
        is_written = number in others
        return [
            number if token in ends and (other is None or not is_written) else other
            for token, other in zip(ids, others, strict=True)
        ]

    def _shown(self, ids: Sequence[int], pieces: Sequence[bytes | None]) -> list[bytes]:
        """Return the bytes of generated tokens, which are those of its name for one without text."""
        names = []
        for before, token, piece in zip([None, *ids], ids, pieces, strict=False):
            if piece is None or token in self._without_counterpart:
                names.append(self._name(token))
            elif before in self._without_counterpart:  # which is text that this goes on with
                names.append(self._known.pieces[token] or b"")
            else:
                names.append(piece)
        if not names[-1] and pieces[-1] is not None:  # nothing follows that a space is added to
            names[-1] = self._known.pieces[ids[-1]] or b""
        return names

    def _name(self, token: int) -> bytes:
        """Return what is shown of a token without text; nothing if the other side cannot write it."""
        name = self._student.convert_ids_to_tokens(token) or "\N{REPLACEMENT CHARACTER}"
        try:
            return b"".join(each.bytes for each in self._encoder.encode(name.encode()))
        except ValueError:
            return b""

    def _continued(
        self, read: list[_Part], completion: list[_Part], *, apart: bool
    ) -> tuple[list[int], list[_Sized]]:
        """Return what is before the completion, and the completion, as one text unless it is apart."""
        if apart or not (read and isinstance(read[-1], bytes)):
            before = self._read(read)
            after = self._encoded(completion, begins=self._adds_space or not read)
        elif not (completion and isinstance(completion[0], bytes)):
            before = self._read(read)
            after = self._encoded(completion, begins=False)
        else:
            whole = self._encoder.encode(read[-1] + completion[0])
            sides = self._encoder.split(whole, len(read[-1]))
            left, right = ([(token.id, len(token.bytes)) for token in side] for side in sides)
            before = self._read(read[:-1]) + left
            after = right + self._encoded(completion[1:], begins=self._adds_space)
        return [*self._frame, *(token for token, _ in before)], after

    def _read(self, parts: list[_Part]) -> list[_Sized]:
        """Return the tokens of what stands before a completion, as the other tokenizer reads a text."""
        return [token for part in parts for token in self._tokens(part, begins=True)]

    def _encoded(self, parts: list[_Part], *, begins: bool) -> list[_Sized]:
        """Return the tokens of what is scored, with an added space where the student's side has one."""
        sized: list[_Sized] = []
        for number, part in enumerate(parts):
            sized += self._tokens(part, begins=self._adds_space if number else begins)
        return sized

    def _tokens(self, part: _Part, *, begins: bool) -> list[_Sized]:
        """Return the tokens of bytes, or a special token, which has the size 1."""
        if isinstance(part, int):
            return [(part, 1)]
        return [(token.id, len(token.bytes)) for token in self._encoder.encode(part, begins=begins)]

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


def _joined(parts: Iterable[_Part]) -> list[_Part]:
    """Join the bytes between special tokens."""
    joined: list[_Part] = []
    for part in parts:
        if isinstance(part, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += part
        elif part != b"":
            joined.append(part)
    return joined
