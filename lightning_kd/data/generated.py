"""Generated rows of ``predict``: token ids, whether they ended, and of which tokenizer."""

import hashlib
import json
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.data.sources import WHERE

PROMPT_IDS = "prompt_ids"
"""Column with the tokens of the prompt, as the model read them."""
COMPLETION_IDS = "completion_ids"
"""Column with the tokens of the completion, its EOS included if it ended."""
ENDED = "ended"
"""Column that is false if a completion was truncated."""
FINGERPRINT = "tokenizer_fingerprint"
"""Column with :func:`tokenizer_fingerprint` of the tokenizer that the ids belong to."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of which token each id stands for.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> tokenizer_fingerprint(arithmetic_tokenizer())
        'c74d1c17e6a0c8f8'
    """
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).hexdigest()


def real_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row where a mask is true, ``(B, T)`` both.

    Example:
        >>> import torch
        >>> real_tokens(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[False, True], [True, True]]))
        [[5], [6, 7]]
    """
    pairs = zip(ids.cpu(), mask.cpu(), strict=True)
    return [row[kept].tolist() for row, kept in pairs]


def given_ids(
    columns: dict[str, list[Any]], name: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | None]:
    """Return the token ids of a column, None for a row without.

    Args:
        columns: Some rows, with the columns ``name`` and :data:`FINGERPRINT`, if there are any.
        name: :data:`PROMPT_IDS` or :data:`COMPLETION_IDS`.
        tokenizer: The one that the ids must belong to.

    Raises:
        ValueError: If the ids are another tokenizer's, nobody's, or none of this tokenizer, or those
            of a completion go on behind its EOS.
    """
    if not any(columns.get(name, ())):
        return [None] * len(columns[WHERE])
    ours, size = tokenizer_fingerprint(tokenizer), max(tokenizer.get_vocab().values()) + 1
    result: list[list[int] | None] = []
    for text, theirs, where in zip(
        columns[name], columns[FINGERPRINT], columns[WHERE], strict=True
    ):
        if text is None:
            result.append(None)
            continue
        if theirs != ours:
            whose = "no tokenizer_fingerprint" if theirs is None else f"tokenizer {theirs}"
            raise ValueError(
                f"{where}: column {name!r} has token ids, but of {whose}, and data.tokenizer is "
                f"{ours}: they may stand for other tokens. Use the tokenizer that wrote them, or set "
                "data.use_token_ids: false to tokenize the texts"
            )
        ids = json.loads(text)
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < size]
        if wrong:
            raise ValueError(
                f"{where}: column {name!r} has {wrong[0]!r}, which is no token of the tokenizer: its "
                f"ids go from 0 to {size - 1}. Leave the row out, or set data.use_token_ids: false "
                "to tokenize the texts"
            )
        eos = tokenizer.eos_token_id
        if name == COMPLETION_IDS and eos in ids[:-1]:
            raise ValueError(
                f"{where}: column {name!r} has the EOS, {eos}, as number {ids.index(eos) + 1} of its "
                f"{len(ids)} tokens, and generation ends there: what follows must not be trained on. "
                "Cut the ids behind it"
            )
        result.append(ids)
    return result
