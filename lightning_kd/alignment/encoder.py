"""From bytes to tokens whose bytes they are."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_kd.token_bytes import TokenBytes

_BROKEN = re.compile("([\udc80-\udcff]+)")
"""Bytes that are no UTF-8, as Python shows them in a text."""

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The letter that SentencePiece writes for a space."""

_WORDS = re.compile(r"\s*\S+|\s+")

_OF_A_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""What SentencePiece calls a token that is there for letters without one."""

_INSIDE_SUCH_A_NAME = "(?<=<)(?=0x[0-9A-F]{2}>)"
"""Where its name in a text is cut, so that Unigram does not take the text for that byte."""


class Token(NamedTuple):
    """A token, and the bytes that it stands for where it is."""

    id: int
    bytes: bytes


class ByteEncoder:
    """The tokens of a text, each with its bytes: joined, they are the text's.

    A text is tokenized as the tokenizer does it, names of special tokens in it as other text. Bytes
    that are no UTF-8, as where half a character has been cut off, and the letter that SentencePiece
    writes for a space are given in tokens of one byte; so are words that the tokenizer would write
    differently for another reason. Letters are not composed (NFC), which would change their bytes, so
    that text that is composed already has the tokenizer's tokens. A space that the tokenizer puts
    before a text is no byte of it, and what goes on with a text is tokenized without it.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: If the bytes of its tokens are not known
            (:meth:`~lightning_kd.token_bytes.TokenBytes.of_tokenizer`), or it cuts a text by chance.

    Example:
        >>> from lightning_kd.data.tokenizer_training import train_tokenizer
        >>> encoder = ByteEncoder(train_tokenizer(["two and two is four"] * 3, vocab_size=270))
        >>> [token.bytes for token in encoder.encode(b"two two")]
        [b'two', b' two']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._known = TokenBytes.of_tokenizer(tokenizer)
        self._name = type(tokenizer).__name__
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"].get("dropout"):
            raise ValueError(
                f"{self._name} has a dropout of {state['model']['dropout']}, which cuts a text in "
                "other tokens each time: set it to null in the model of its tokenizer.json (in Python, "
                "tokenizer.backend_tokenizer.model.dropout = None)"
            )
        self._composes = any(s["type"] == "NFC" for s in _steps(state["normalizer"], "normalizers"))
        special = {number for number, own in enumerate(self._known.is_special.tolist()) if own}
        exact = _without_normalizer(_without_names(state, special), "NFC")
        self._begin, self._go_on = (_reader(part) for part in (exact, _without_added_space(exact)))
        begun, going_on = (reader.encode("a").ids for reader in (self._begin, self._go_on))
        self._adds_space = begun != going_on
        self._id_of: dict[bytes, int] = {}
        names = {number: name for name, number in tokenizer.get_vocab().items()}
        of_a_byte = {number for number, name in names.items() if _OF_A_BYTE.fullmatch(name)}
        # The tokenizer takes such a token where there is no other.
        for number in sorted(range(len(self._known.pieces)), key=of_a_byte.__contains__):
            if piece := self._known.pieces[number]:
                self._id_of.setdefault(piece, number)
        self._neighbours = {pair for piece in self._id_of for pair in pairwise(piece)}
        self._goes_on = {byte for byte, _ in self._neighbours}
        letter = _SPACE if self._is_changed(_SPACE) else ""
        cut = f"|{_INSIDE_SUCH_A_NAME}" if self._is_changed("<0x41>") else ""
        self._in_byte_tokens = re.compile(f"([\udc80-\udcff{letter}]+){cut}")

    @property
    def writes_bytes_alone(self) -> bool:
        """Whether each byte has the same token whatever stands beside it."""
        return not (self._neighbours or self._adds_space)

    @property
    def knows_every_byte(self) -> bool:
        """Whether any bytes can be written."""
        return self._known.knows_every_byte

    def most_bytes(self, text: str) -> int:
        """Return how many bytes a text has at most as the tokenizer reads it, letters composed."""
        # NFC writes a letter in three times its bytes at most (U+1D160), and none of ASCII otherwise.
        return len(text.encode()) * (3 if self._composes and not text.isascii() else 1)

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
        runs = self._in_byte_tokens.split(text.decode("utf-8", "surrogateescape"))
        tokens: list[Token] = []
        for number, run in enumerate(runs):
            if number % 2:
                tokens += self._in_bytes((run or "").encode("utf-8", "surrogateescape"))
            elif run:
                tokens += self._run(run, begins and number == 0)
        return tokens

    def check_known(self, ids: Iterable[int], text: str) -> None:
        """Refuse what the tokenizer has made of a text if it has no token for a part of it.

        Raises:
            ValueError: If there is such a part.
        """
        if self.knows_every_byte:
            return
        if any(self._known.pieces[number] is None for number in ids):
            raise ValueError(self._refused(text))

    def split(self, tokens: Sequence[Token], at: int) -> tuple[list[Token], list[Token]]:
        """Cut a text behind some of its bytes; a token across the cut becomes those of its parts.

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
                    self._part(part) for part in (token.bytes[:inside], token.bytes[inside:])
                )
                return [*tokens[:place], *first], [*second, *tokens[place + 1 :]]
            start += len(token.bytes)
        return list(tokens), []

    def _refused(self, text: str) -> str:
        return (
            f"{self._name} cannot write all of {text[:60]!r}: it has no token for a part of it, or "
            "writes it differently. Take a teacher whose tokenizer knows every byte, or leave the "
            "row out"
        )

    def _is_changed(self, text: str) -> bool:
        """Return whether the tokenizer, which could write the text, writes another one."""
        return self.knows_every_byte and self._plain(text, begins=False) is None

    def _run(self, text: str, begins: bool) -> list[Token]:
        tokens = self._plain(text, begins)
        if tokens is not None:
            return tokens
        if not self.knows_every_byte:
            raise ValueError(self._refused(text))
        tokens = []
        for word in _WORDS.findall(text):
            plain = self._plain(word, begins and not tokens)
            tokens += self._in_bytes(word.encode()) if plain is None else plain
        return tokens

    def _plain(self, text: str, begins: bool) -> list[Token] | None:
        """Return the tokens that the tokenizer gives; None if they are not the text's bytes."""
        reader = self._begin if begins else self._go_on
        ids = reader.encode(text, add_special_tokens=False).ids
        pieces = [self._known.pieces[number] for number in ids]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        tokens, joined, own = list(map(Token, ids, known)), b"".join(known), text.encode()
        if joined == own:
            return tokens
        if not begins or joined != b" " + own:
            return None
        first = next(place for place, token in enumerate(tokens) if token.bytes)
        tokens[first] = Token(tokens[first].id, tokens[first].bytes[1:])
        return tokens

    def _part(self, piece: bytes) -> list[Token]:
        """Return the tokens of a part of a token: one, those of the tokenizer, or one for each byte."""
        number = self._id_of.get(piece)
        if number is not None:
            return [Token(number, piece)]
        text = piece.decode("utf-8", "surrogateescape")
        plain = None if _BROKEN.search(text) else self._plain(text, begins=False)
        return self._in_bytes(piece) if plain is None else plain

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


def _reader(state: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer for which text is never a special token, is not cut and not filled up."""
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_names(state: dict[str, Any], special: Collection[int]) -> dict[str, Any]:
    """Return the state of a tokenizer whose model does not find the names of special tokens in a text.

    Unigram looks for all of its tokens there, and so these are called otherwise.
    """
    model = state["model"]
    if model["type"] != "Unigram":
        return state
    # Of letters that stand for nothing in Unicode, so that no text has them.
    names = {number: f"\uffff{number}\uffff" for number in special if number < len(model["vocab"])}
    pieces = [[names.get(n, name), score] for n, (name, score) in enumerate(model["vocab"])]
    added = [t | {"content": names.get(t["id"], t["content"])} for t in state["added_tokens"]]
    return state | {"model": model | {"vocab": pieces}, "added_tokens": added}


def _without_added_space(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a tokenizer that puts no space before a text."""
    # A Metaspace of an older file has its add_prefix_space beside its scheme.
    cuts = [
        step
        | ({"prepend_scheme": "never"} if step["type"] == "Metaspace" else {})
        | ({"add_prefix_space": False} if "add_prefix_space" in step else {})
        for step in _steps(state["pre_tokenizer"], "pretokenizers")
    ]
    before = {"type": "Sequence", "pretokenizers": cuts} if cuts else None
    return _without_normalizer(state, "Prepend") | {"pre_tokenizer": before}


def _without_normalizer(state: dict[str, Any], kind: str) -> dict[str, Any]:
    steps = [s for s in _steps(state["normalizer"], "normalizers") if s["type"] != kind]
    return state | {"normalizer": {"type": "Sequence", "normalizers": steps} if steps else None}


def _steps(component: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return component[several] if component["type"] == "Sequence" else [component]
