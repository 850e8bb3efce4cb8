"""Batches of a loader of the user's own: what they must have, and what is derived for them."""

from collections.abc import Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, Batch, PromptBatch
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
        given: Mapping[str, Any] = batch
        if "attention_mask" not in given:
            return batch  # which the check of batches refuses
        labeled = labels != IGNORE_INDEX
        starts = labeled[:, 0]
        if starts.any() and (starts | ~labeled.any(-1)).all():  # plain text
            numbers = torch.arange(first, first + len(labels), device=labels.device)
            return cast(Batch, {**batch, "row": numbers, "sample": numbers})
    elif not prompts_only:
        return batch
    return with_prompts(batch, tokenizer, first)


def rows_of_loader(loader: object) -> int | None:
    """Return the rows of a loader, of which its sampler repeats some to give all processes as many.

    The first ones come again behind the last, so that what is beyond this number is a repetition. None
    where the sampler repeats nothing.

    Raises:
        ValueError: If it does, in batches that a sampler of the user's own composes.
    """
    sampler = getattr(loader, "sampler", None)
    batches = getattr(loader, "batch_sampler", None)
    inner = getattr(batches, "sampler", None)
    sampler = sampler if isinstance(sampler, DistributedSampler) else inner
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    rows = len(cast(Sized, sampler.dataset))
    if rows % sampler.num_replicas == 0:
        return None
    if batches is not None and type(batches) is not BatchSampler:
        raise ValueError(
            f"the loader has {rows} rows for {sampler.num_replicas} processes, so that "
            f"DistributedSampler repeats some, and {type(batches).__name__} leaves open which; use "
            "a number of rows that the processes divide, without a batch sampler, or in one process "
            "(--trainer.devices 1)"
        )
    return rows


def without_repetitions(batch: Batch, loader: object, places: Tensor) -> Batch:
    """Return an own batch whose repeated rows are filler.

    Args:
        batch: Has numbers of rows.
        loader: Gave it.
        places: Of its rows among those that the loaders of all processes give.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> rows = [torch.tensor([number]) for number in range(3)]
        >>> loader = DataLoader(rows, sampler=DistributedSampler(rows, 2, 1, shuffle=False))
        >>> batch = {"labels": torch.tensor([[7]]), "row": torch.tensor([3])}
        >>> without_repetitions(batch, loader, batch["row"])
        {'labels': tensor([[-100]]), 'row': tensor([-1])}
    """
    rows = rows_of_loader(loader)
    if rows is None:
        return batch
    again = places.to(batch["row"].device) >= rows
    filler = {
        "labels": batch["labels"].masked_fill(again[:, None], IGNORE_INDEX),
        "row": batch["row"].masked_fill(again, FILLER_ROW),
    }
    return cast(Batch, {**batch, **filler})


def _on_the_left(row: Tensor, width: int, value: int) -> Tensor:
    return torch.cat([row.new_full((width - len(row),), value), row])
