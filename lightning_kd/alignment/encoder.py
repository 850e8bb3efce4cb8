"""From bytes to tokens whose bytes they are."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_kd.token_bytes import TokenBytes

_BROKEN = re.compile("([\udc80-\udcff]+)")
"""Bytes that are no UTF-8, as Python shows them in a text."""

_WORDS = re.compile(r"\s*\S+|\s+")


class Token(NamedTuple):
    """A token, and the bytes that it stands for where it is."""

    id: int
    bytes: bytes


class ByteEncoder:
    """The tokens of a text, each with its bytes: joined, they are the text's.

    A text is tokenized as the tokenizer does it, names of special tokens in it as other text. Bytes
    that are no UTF-8, as where half a character has been cut off, and words that the tokenizer would
    write differently (by NFC, or with the letter that SentencePiece writes for a space) are given in
    tokens of one byte. A space that the tokenizer puts before a text is no byte of it.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: If the bytes of its tokens are not known
            (:meth:`~lightning_kd.token_bytes.TokenBytes.of_tokenizer`).

    Example:
        >>> from lightning_kd.data.tokenizer_training import train_tokenizer
        >>> encoder = ByteEncoder(train_tokenizer(["two and two is four"] * 3, vocab_size=270))
        >>> [token.bytes for token in encoder.encode(b"two two")]
        [b'two', b' two']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._known = TokenBytes.of_tokenizer(tokenizer)
        self._name = type(tokenizer).__name__
        # A copy: text of a row is never a special token, is not cut and not filled up.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._id_of: dict[bytes, int] = {}
        for number, piece in enumerate(self._known.pieces):
            if piece:
                self._id_of.setdefault(piece, number)
        self._neighbours = {pair for piece in self._id_of for pair in pairwise(piece)}
        self._goes_on = {byte for byte, _ in self._neighbours}

    @property
    def knows_every_byte(self) -> bool:
        """Whether any bytes can be written."""
        return self._known.knows_every_byte

    def may_join(self, left: int, right: int | None = None) -> bool:
        """Return whether a byte stands beside another inside a token, so that neither need end one.

        Args:
            left: A byte.
            right: The one behind it; None for whichever.

        Example:
            >>> from lightning_kd.data.tokenizer_training import train_tokenizer
            >>> encoder = ByteEncoder(train_tokenizer(["two and two is four"] * 3, vocab_size=260))
            >>> [encoder.may_join(*pair) for pair in (b"wo", b"ow", b"w", b"o")]
            [True, False, True, False]
        """
        return left in self._goes_on if right is None else (left, right) in self._neighbours

    def encode(self, text: bytes, *, begins: bool = True) -> list[Token]:
        """Return the tokens of a text.

        Args:
            text: UTF-8, or what is left of it.
            begins: Whether it begins a text; otherwise no space may be added before it.

        Raises:
            ValueError: If the tokenizer has no tokens for all of its bytes.
        """
        runs = _BROKEN.split(text.decode("utf-8", "surrogateescape"))
        tokens: list[Token] = []
        for number, run in enumerate(runs):
            if number % 2:
                tokens += self._in_bytes(run.encode("utf-8", "surrogateescape"))
            elif run:
                tokens += self._run(run, begins and number == 0)
        return tokens

    def split(self, tokens: Sequence[Token], at: int) -> tuple[list[Token], list[Token]]:
        """Cut a text behind some of its bytes; a token across the cut is replaced by others.

        Args:
            tokens: Of the text.
            at: Bytes before the cut.

        Raises:
            ValueError: If there are no tokens for both parts of it.

        Example:
            >>> from lightning_kd.data.tokenizer_training import train_tokenizer
            >>> encoder = ByteEncoder(train_tokenizer(["two and two is four"] * 3, vocab_size=270))
            >>> before, after = encoder.split(encoder.encode(b"two two"), 5)
            >>> b"".join(t.bytes for t in before), b"".join(t.bytes for t in after)
            (b'two t', b'wo')
        """
        start = 0
        for place, token in enumerate(tokens):
            if start == at:
                return list(tokens[:place]), list(tokens[place:])
            inside = at - start
            if inside < len(token.bytes):
                first, second = (
                    self._shortest(part) for part in (token.bytes[:inside], token.bytes[inside:])
                )
                return [*tokens[:place], *first], [*second, *tokens[place + 1 :]]
            start += len(token.bytes)
        return list(tokens), []

    def _run(self, text: str, begins: bool) -> list[Token]:
        tokens = self._plain(text, begins)
        if tokens is not None:
            return tokens
        if not self.knows_every_byte:
            raise ValueError(
                f"{self._name} cannot write all of {text[:60]!r}: it has no token for a part of it, or "
                "writes it differently. Take a teacher whose tokenizer knows every byte, or leave the "
                "row out"
            )
        tokens = []
        for word in _WORDS.findall(text):
            plain = self._plain(word, begins and not tokens)
            tokens += self._in_bytes(word.encode()) if plain is None else plain
        return tokens

    def _plain(self, text: str, begins: bool) -> list[Token] | None:
        """Return the tokens that the tokenizer gives; None if they are not the text's bytes."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        pieces = [self._known.pieces[number] for number in ids]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        tokens, joined, own = list(map(Token, ids, known)), b"".join(known), text.encode()
        if joined == own:
            return tokens
        if joined != b" " + own:
            return None
        first = next(place for place, token in enumerate(tokens) if token.bytes)
        rest = tokens[first].bytes[1:]
        if begins:
            tokens[first] = Token(tokens[first].id, rest)
            return tokens
        if rest not in self._id_of and rest and not self.knows_every_byte:
            return None
        return [*tokens[:first], *self._shortest(rest), *tokens[first + 1 :]]

    def _shortest(self, piece: bytes) -> list[Token]:
        """Return the token of these bytes if there is one, else a token for each; none of no bytes."""
        number = self._id_of.get(piece)
        return self._in_bytes(piece) if number is None else [Token(number, piece)]

    def _in_bytes(self, several: Iterable[int]) -> list[Token]:
        tokens = []
        for byte in several:
            one = bytes([byte])
            if one not in self._id_of:
                raise ValueError(
                    f"{self._name} has no token for the byte {byte:#04x} alone, which is a part of a "
                    "character or of a longer token: take a teacher whose tokenizer knows every byte"
                )
            tokens.append(Token(self._id_of[one], one))
        return tokens
