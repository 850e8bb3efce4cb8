"""Tokenizers: loading them, their padding and what ends a sequence."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    TokenizerLike = str | os.PathLike[str] | PreTrainedTokenizerBase
else:
    # What a command line and its help offer: all that can be written there.
    TokenizerLike = str


def tokenizer_of(given: object) -> PreTrainedTokenizerBase:
    """Return a tokenizer that is given by name, or as it is.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, str | os.PathLike):
        what = f"class ({given.__name__})" if isinstance(given, type) else type(given).__name__
        raise ValueError(
            f"tokenizer is a {what}; give a directory, a hub name, or a tokenizer of transformers (a "
            "processor has one as its .tokenizer; of a Tokenizer of tokenizers, "
            "PreTrainedTokenizerFast(tokenizer_object=...), with its eos_token)"
        )
    return load_tokenizer(os.fspath(given))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a hub name; no code that comes with it runs.

    Raises:
        ValueError: If there is none.
    """
    check_path(name_or_path, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer {name_or_path!r}: {error}") from error


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token of a tokenizer, or else its EOS.

    Raises:
        ValueError: If it has neither.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} ({tokenizer.name_or_path or 'given'}) has "
            "neither padding nor EOS to fill up rows with: set its eos_token or its pad_token"
        )
    return int(eos if pad is None else pad)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer's tokens and their ids; its rules and templates are not in it."""
    text = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a completion: the tokenizer's and the generation config's."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ids = of_model if isinstance(of_model, list) else [of_model]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


def check_path(name_or_path: str, what: str) -> None:
    """Tell a directory that is not there from a hub name, before anything asks the network.

    Raises:
        ValueError: If ``name_or_path`` can only be a path and does not exist.
    """
    path = Path(name_or_path).expanduser()
    only_a_path = name_or_path.startswith((".", "/", "~")) or len(path.parts) > 2
    if only_a_path and not path.exists():
        raise ValueError(
            f"the {what} directory {name_or_path!r} does not exist; give a directory written by "
            "save_pretrained, or a hub name such as 'Qwen/Qwen3-0.6B'"
        )


def special_token_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text.

    Raises:
        ValueError: If the tokenizer does more to a text than to put tokens around it.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> special_token_frame(arithmetic_tokenizer())
        ([], [])
    """
    text, bare = "a", _tokens(["a"], tokenizer)[0]
    if not bare:  # none of the tokenizer's letters
        for text in tokenizer.get_vocab():
            bare = _tokens([text], tokenizer)[0]
            if bare:
                break
    framed: list[int] = tokenizer(text)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ValueError(
        f"the tokenizer makes {framed} of {text!r} and {bare} without special tokens: it does more "
        "than put tokens before and after a text, so documents and prompts cannot be framed as it "
        "does; use a tokenizer that only adds tokens such as BOS and EOS"
    )


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return tokens of texts, nothing added; names of special tokens in the text are those tokens."""
    # Not verbose: a tokenizer warns of texts that are longer than its model, before they are cut. Rows
    # beyond the models' positions are refused where the models are known.
    batch: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return batch


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return tokens of texts, nothing added; refuses those that the tokenizer turns into padding.

    Raises:
        ValueError: If the tokenizer gives padding for characters that it does not know.
    """
    batch = _tokens(texts, tokenizer)
    padding = tokenizer.pad_token_id
    if padding is not None and padding not in {tokenizer.eos_token_id, tokenizer.unk_token_id}:
        for text, ids in zip(texts, batch, strict=True):
            if padding in ids and tokenizer.pad_token not in text:
                raise ValueError(
                    f"the tokenizer does not know all characters of {text[:60]!r}, and gives "
                    f"{tokenizer.pad_token}, its padding, for them, which would be trained on: use a "
                    "tokenizer that was made for this text (lightning-kd tokenizer trains one)"
                )
    return batch


def begun(ids: list[int], before: list[int]) -> list[int]:
    """Return the tokens after those that begin a text, once."""
    return ids if before and ids[: len(before)] == before else [*before, *ids]


def encode_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return tokens of prompts, with the tokens that begin a text, without those that end one."""
    before, _ = special_token_frame(tokenizer)
    return [begun(ids, before) for ids in tokens_of(texts, tokenizer)]
