"""Tokens as bytes: how much text each token of a tokenizer stands for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNKNOWN = -1
"""Bytes of a token of which nobody knows what text it stands for, such as ``<unk>``."""


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that a tokenizer gives for any text that it has no token for.

    Raises:
        ValueError: As :meth:`TokenBytes.of_tokenizer`.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> unknown_tokens(arithmetic_tokenizer()), arithmetic_tokenizer().pad_token_id
        ({0}, 0)
    """
    kind, vocabulary = _Kind.of(tokenizer), tokenizer.get_vocab()
    if kind.knows_every_byte:
        return set()
    names = {tokenizer.unk_token, _unknown_token(kind.backend.model)}
    return {vocabulary[name] for name in names if name in vocabulary}


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

_KEEPS_TEXT = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
"""Kinds of pre-tokenizers that cut a text without leaving anything out."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of UTF-8 text that each token of a tokenizer stands for.

    Special tokens stand for none. The bytes of a text's tokens add up to those of the text as the
    tokenizer reads it (some normalize to NFC). The space that some tokenizers put before a text is
    none of its bytes; it is told by its place, at the beginning of a row, behind a special token or
    where a text is said to begin, so that of a text that begins with a space itself one byte may be
    missing.

    Example:
        >>> from lightning_kd.data.tokenizer_training import train_tokenizer
        >>> tokenizer = train_tokenizer(["two and two is four"] * 3, vocab_size=270)
        >>> text = "two or \u00e9"
        >>> ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        >>> TokenBytes.of_tokenizer(tokenizer).of(ids).sum().item(), len(text.encode())
        (9, 9)
    """

    pieces: tuple[bytes | None, ...]
    """Bytes of each token, as it is in the middle of a text; None where they are not known."""
    lengths: Tensor
    """Number of them, ``(V,)``; -1 where they are not known."""
    is_special: Tensor
    """True for special tokens, ``(V,)``."""
    may_begin_with_added_space: Tensor
    """True for tokens whose first byte is not of the text if they begin one, ``(V,)``."""
    knows_every_byte: bool
    """Whether there is a token for each byte, so that any bytes can be written in tokens."""

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """Read the bytes off a tokenizer, in time linear in its vocabulary.

        They are known of byte-level BPE, of SentencePiece with byte fallback (BPE and Unigram), of
        WordPiece that keeps white space, and of tokenizers whose tokens joined are the text.

        Raises:
            ValueError: If it is of another kind, changes a text before it cuts it, or leaves letters
                out that it does not know.
        """
        kind = _Kind.of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        pieces: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            pieces[number] = kind.bytes_of(token)
        own = kind.backend.get_vocab(with_added_tokens=False)
        for number, added in kind.backend.get_added_tokens_decoder().items():
            # A piece of the model's own is written as the others are (Gemma's runs of spaces are both).
            piece = kind.bytes_of(added.content) if added.content in own else None
            text = added.content.encode() if piece is None else piece
            # White space around it would be part of it.
            pieces[number] = None if added.lstrip or added.rstrip else text
        special = torch.zeros(len(pieces), dtype=torch.bool)
        for number in _special_ids(tokenizer, kind.backend):
            special[number], pieces[number] = True, b""
        unknown = unknown_tokens(tokenizer)
        is_bpe = isinstance(kind.backend.model, models.BPE)
        if is_bpe and not (kind.knows_every_byte or unknown):
            raise ValueError(_refused(tokenizer, "it leaves out letters that it does not know"))
        for number in unknown:
            pieces[number] = None
        lengths = [UNKNOWN if piece is None else len(piece) for piece in pieces]
        begins = [kind.adds_space and piece is not None and piece[:1] == b" " for piece in pieces]
        tensors = torch.tensor(lengths), special, torch.tensor(begins)
        return cls(tuple(pieces), *tensors, kind.knows_every_byte)

    def to(self, device: torch.device) -> "TokenBytes":
        """Return the same on a device."""
        return replace(
            self,
            lengths=self.lengths.to(device),
            is_special=self.is_special.to(device),
            may_begin_with_added_space=self.may_begin_with_added_space.to(device),
        )

    def of_row(self, ids: Sequence[int], begins_text_at: int | None = None) -> list[bytes | None]:
        """Return the bytes of each token of a row, as :meth:`of` counts them.

        Args:
            ids: The tokens.
            begins_text_at: Where a text begins that was tokenized by itself, beside the beginning of
                the row and what is behind special tokens.

        Returns:
            Bytes, none for special tokens; None where they are not known.
        """
        begins = torch.zeros(1, len(ids), dtype=torch.bool)
        if begins_text_at is not None:
            begins[:, begins_text_at : begins_text_at + 1] = True
        counts = self.of(torch.tensor([ids], dtype=torch.long), begins)[0].tolist() if ids else []
        rows = []
        for token, count in zip(ids, counts, strict=True):
            piece = self.pieces[token] if 0 <= token < len(self.pieces) else None
            rows.append(None if piece is None else piece[len(piece) - count :])
        return rows

    def of(self, ids: Tensor, begins_text: Tensor | None = None) -> Tensor:
        """Return the bytes of each token of some rows, ``(B, T) -> (B, T)``.

        Tokens that the tokenizer does not have are -1.

        Args:
            ids: The tokens.
            begins_text: True where a text begins that was tokenized by itself, ``(B, T)``, beside the
                beginnings of rows and what is behind special tokens.
        """
        known = (ids >= 0) & (ids < len(self.lengths))
        safe = ids.where(known, 0)
        begins = F.pad(self.is_special[safe][:, :-1], (1, 0), value=True)
        if begins_text is not None:
            begins = begins | begins_text
        added = begins & self.may_begin_with_added_space[safe]
        return (self.lengths[safe] - added.long()).where(known, UNKNOWN)


@dataclass(frozen=True)
class _Kind:
    """What the tokens of a tokenizer are made of."""

    backend: Tokenizer
    bytes_of: Callable[[str], bytes | None]
    adds_space: bool
    knows_every_byte: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Kind":
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(_refused(tokenizer, "it is none of the tokenizers library"))
        decoders = _parts(backend.decoder, "decoders")
        before = _parts(backend.pre_tokenizer, "pretokenizers")
        lost = [part["type"] for part in before if not _keeps_text(part)]
        others = [part["replacement"] for part in before if part["type"] == "Metaspace"]
        lost += [f"Metaspace({other!r})" for other in others if other != _SPACE]
        changes = [p["type"] for p in _parts(backend.normalizer, "normalizers") if _changes(p)]
        if lost or changes:
            raise ValueError(
                _refused(
                    tokenizer, f"{', '.join([*changes, *lost])} changes a text before it is cut"
                )
            )
        types, vocabulary = [part["type"] for part in decoders], backend.get_vocab().keys()
        if types == ["ByteLevel"]:
            adds = any(part.get("add_prefix_space") for part in before)
            return cls(backend, _bytes_of_letters, adds, _BYTE_OF.keys() <= vocabulary)
        model: Any = backend.model
        metaspace = [part for part in before if part["type"] == "Metaspace"]
        in_bytes = any(part["type"] == "ByteLevel" for part in before)
        if isinstance(model, models.WordPiece) and not in_bytes:
            # Its own decoder puts a space between words; here they are tokens, or letters of some.
            adds = any(part["prepend_scheme"] != "never" for part in metaspace)
            prefix, space = model.continuing_subword_prefix, _SPACE if metaspace else " "
            read = partial(_bytes_of_word_piece, prefix=prefix, space=space)
            return cls(backend, read, adds, False)
        if _falls_back_to_bytes(model) and {*types} <= _SENTENCE_PIECE:
            adds = any(
                part.get("start", 0) > 0 or part.get("prepend_scheme", "never") != "never"
                for part in decoders
            )
            every_byte = {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary
            return cls(backend, _bytes_of_piece, adds, every_byte)
        if types == ["Fuse"] and not (in_bytes or metaspace):
            return cls(backend, str.encode, False, False)
        what = " and ".join(types) or "a space between tokens"
        raise ValueError(_refused(tokenizer, f"{what} joins its tokens to a text"))


_SENTENCE_PIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> str:
    return (
        f"the bytes of the tokens of {type(tokenizer).__name__} are not known, for {reason}; they are "
        "of byte-level BPE, of SentencePiece with byte fallback and of WordPiece that keeps white space"
    )


def _parts(component: object, several: str) -> Sequence[dict[str, Any]]:
    """Return the steps of a part of a tokenizer, in order."""
    if component is None:
        return []
    state = json.loads(cast(Any, component).__getstate__())
    return state[several] if state["type"] == "Sequence" else [state]


def _falls_back_to_bytes(model: Any) -> bool:
    if isinstance(model, models.Unigram):  # which tells it in its state alone
        return bool(json.loads(model.__getstate__())["byte_fallback"])
    return bool(getattr(model, "byte_fallback", False))


def _unknown_token(model: Any) -> str | None:
    """Return the token that a model gives for letters that it does not know."""
    if not isinstance(model, models.Unigram):
        return getattr(model, "unk_token", None)
    number = json.loads(model.__getstate__())["unk_id"]
    return None if number is None else cast(str, model.id_to_token(number))


def _keeps_text(step: dict[str, Any]) -> bool:
    return step["type"] in _KEEPS_TEXT and step.get("behavior") != "Removed"


def _changes(step: dict[str, Any]) -> bool:
    """Return whether a normalizer changes more than how a text is written down."""
    if step["type"] == "Replace":
        return bool(step["pattern"] != {"String": " "} or step["content"] != _SPACE)
    return not (step["type"] == "NFC" or (step["type"] == "Prepend" and step["prepend"] == _SPACE))


def _special_ids(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> set[int]:
    added = backend.get_added_tokens_decoder().items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def _letters() -> dict[str, int]:
    """Return the letter that byte-level BPE writes for each byte, as GPT-2 has them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _letters()


def _bytes_of_letters(token: str) -> bytes | None:
    if any(letter not in _BYTE_OF for letter in token):
        return None
    return bytes(_BYTE_OF[letter] for letter in token)


def _bytes_of_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _bytes_of_word_piece(token: str, prefix: str, space: str) -> bytes:
    return token.removeprefix(prefix).replace(space, " ").encode()
