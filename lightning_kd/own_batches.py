"""Batches of a loader of the user's own: what they must have, and what is derived for them."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import IGNORE_INDEX, Batch, PromptBatch
from lightning_kd.tokenization import padding_id

_PROMPT = ("input_ids", "attention_mask")


def is_own(batch: object) -> bool:
    """Return whether a batch is none of this library's, which number their rows."""
    return isinstance(batch, Mapping) and "input_ids" in batch and "row" not in batch


def check_prompts(batch: object) -> None:
    """Validate that a batch has prompts to complete, padded on one side.

    Raises:
        ValueError: If it has not.

    Example:
        >>> check_prompts({"input_ids": torch.ones(2, 3)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: a batch of prompts needs input_ids and attention_mask: integer tensors of one ...
    """
    named = {n: batch.get(n) for n in _PROMPT} if isinstance(batch, Mapping) else {}
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    whole = [tensor for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()]
    if len(whole) < len(_PROMPT) or whole[0].shape != whole[1].shape:
        came = {
            n: (str(v.dtype), *v.shape) if isinstance(v, Tensor) else type(v).__name__
            for n, v in named.items()
        }
        raise ValueError(
            "a batch of prompts needs input_ids and attention_mask: integer tensors of one shape "
            "(rows, tokens), with attention_mask 1 on tokens and 0 on padding, on the left or on the "
            f"right; got {came or type(batch).__name__}"
        )
    mask = whole[1].bool()
    begins = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
    if (begins != 1).any():
        raise ValueError(
            "the attention_mask of a prompt has a gap, or no token at all; prompts are padded on one "
            "side"
        )


def with_prompts(
    batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, first: int
) -> PromptBatch:
    """Return a batch with its prompts: all before a row's first label, or all of it without labels.

    Args:
        batch: ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on either side, and, where
            there are completions, ``labels``.
        tokenizer: For padding and texts.
        first: Number of its first row; the others follow.

    Returns:
        The batch with prompts padded on the left, texts, and numbers of rows and samples.

    Raises:
        ValueError: If it has no prompts: every token of a row has a label, for one.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> own = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        >>> with_prompts(own, arithmetic_tokenizer(), 0)["prompt_ids"].tolist()
        [[5, 6, 7], [0, 8, 9]]
    """
    check_prompts(batch)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = batch.get("labels")
    labeled = torch.zeros_like(mask) if labels is None else labels != IGNORE_INDEX
    in_prompt = mask & (labeled.cumsum(-1) == 0)
    if not in_prompt.any(-1).all():
        raise ValueError(
            "a row has a label on its first token, so that it has no prompt to complete: labels are "
            f"{IGNORE_INDEX} on the prompt, or left out of batches of prompts alone"
        )
    rows = [row[kept] for row, kept in zip(ids, in_prompt, strict=True)]
    completions = [row[kept] for row, kept in zip(ids, labeled, strict=True)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
    found = zip(texts, completions, strict=True)
    width = max(len(row) for row in rows)
    pad = padding_id(tokenizer)
    numbers = torch.arange(first, first + len(rows), device=ids.device)
    given: dict[str, Any] = {"row": numbers, "sample": numbers}
    return cast(
        PromptBatch,
        {
            **given,
            **batch,
            "prompt_ids": torch.stack([_on_the_left(row, width, pad) for row in rows]),
            "prompt_mask": torch.stack(
                [_on_the_left(torch.ones_like(row), width, 0) for row in rows]
            ),
            "prompt": [tokenizer.decode(row) for row in rows],
            "completion": texts,
            "references": [[text] if len(row) else [] for text, row in found],
        },
    )


def evaluated(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, first: int, *, prompts_only: bool
) -> Batch:
    """Return an own batch as one to evaluate or to complete.

    Args:
        batch: As the loader gave it.
        tokenizer: For padding and texts.
        first: Number of its first row.
        prompts_only: Whether it must have prompts; otherwise they are added where it has some.
    """
    labels = batch.get("labels")
    if not prompts_only and isinstance(labels, Tensor) and labels.ndim == 2:
        starts = (labels[:, :1] != IGNORE_INDEX).any()
        if starts or "attention_mask" not in batch:
            return batch  # packed text, or what the check of batches refuses
    elif not prompts_only:
        return batch
    return with_prompts(batch, tokenizer, first)


def _on_the_left(row: Tensor, width: int, value: int) -> Tensor:
    return torch.cat([row.new_full((width - len(row),), value), row])
