"""Texts of a request, as token ids."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.serving.limits import Limits, RefusedError

_CHARACTERS = 4
"""Of a text, for each token that a request may have."""


def check_texts(several: Sequence[Any], limits: Limits) -> None:
    """Refuse what is too much, before anything is tokenized.

    A token has some characters, and padding and prompts have their share.

    Raises:
        RefusedError: If it is.
    """
    texts = sum(len(each) for each in several if isinstance(each, str))
    if len(several) > limits.rows or texts > limits.tokens * _CHARACTERS:
        raise RefusedError(
            413,
            f"the request has {len(several)} prompts and {texts} characters; at most {limits.rows} and "
            f"{limits.tokens * _CHARACTERS} are taken",
        )


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    """Return the ids of a text.

    Raises:
        RefusedError: If it is no Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(400, f"a text is not Unicode: {error.reason}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids
