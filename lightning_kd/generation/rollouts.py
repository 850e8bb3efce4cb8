"""Rollouts: completions as batches to train on."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, PromptBatch, Rollout
from lightning_kd.generation.completions import Completions
from lightning_kd.scoring import ScoredPositions

Truncation = Literal["keep", "mask", "drop"]
"""Treatment of completions that reached their maximum length without an EOS. ``keep`` trains on them;
``mask`` takes their tokens out of the loss and its count, but leaves the row where it is (in the
baselines of its group, as zeros in padded whitening); ``drop`` treats the row as if it were not
there."""


def rollout_batch(
    batch: PromptBatch,
    completions: Completions,
    *,
    pad_id: int,
    group_size: int = 1,
    truncation: Truncation = "keep",
) -> Rollout:
    """The batch with other completions, scored on these alone.

    Args:
        batch: Has prompts, and numbers of samples.
        completions: One for each of its rows.
        pad_id: Fills up the rows.
        group_size: Samples of each prompt, one after the other.
        truncation: What happens to completions without an end.

    Returns:
        A new batch, prompts and completions padded on the right. ``log_probs`` and
        ``sampling_log_probs`` stand where their tokens stand, if the completions have them.
    """
    mask = batch["prompt_mask"]
    starts, lengths = mask.sum(-1), completions.mask.sum(-1)
    rows, width = len(mask), int((starts + lengths).max())
    # Row by row: leave out the padding on the left, read on to the end of the completion.
    place = torch.arange(width, device=mask.device).expand(rows, -1)
    source = (place + (mask.shape[1] - starts)[:, None]).clamp(
        max=mask.shape[1] + completions.ids.shape[1] - 1
    )
    real = place < (starts + lengths)[:, None]
    generated = real & (place >= starts[:, None])
    lost = ~completions.ended & (truncation != "keep")
    labeled = generated & ~lost[:, None]

    def scattered(of_prompt: Tensor, of_completion: Tensor, fill: float, where: Tensor) -> Tensor:
        values = torch.cat([of_prompt, of_completion], -1).gather(-1, source)
        return values.masked_fill(~where, fill)

    ids = scattered(batch["prompt_ids"], completions.ids, pad_id, real)
    written = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": ids.masked_fill(~labeled, IGNORE_INDEX),
        "completion_mask": generated,
        "group": batch["sample"] // group_size,
    }
    # Found here, once for a window: in each step the host would wait for the device.
    ScoredPositions.from_labels(written["labels"])
    rewritten = cast(Rollout, {**batch, **written})
    if completions.log_probs is not None and completions.sampling_log_probs is not None:
        zeros = torch.zeros_like(mask, dtype=completions.log_probs.dtype)
        rewritten["log_probs"] = scattered(zeros, completions.log_probs, 0, labeled)
        rewritten["sampling_log_probs"] = scattered(
            zeros, completions.sampling_log_probs, 0, labeled
        )
    if truncation == "drop":
        rewritten["row"] = batch["row"].masked_fill(lost, FILLER_ROW)
    return rewritten


def rollout_batches(
    batches: Sequence[PromptBatch],
    completions: Completions,
    *,
    pad_id: int,
    group_size: int,
    truncation: Truncation,
) -> list[Rollout]:
    """Return :func:`rollout_batch` of each of several batches, whose rows the completions follow."""
    rollouts, start = [], 0
    for batch in batches:
        own = completions.rows(slice(start, start + len(batch["row"])))
        start += len(batch["row"])
        rollouts.append(
            rollout_batch(batch, own, pad_id=pad_id, group_size=group_size, truncation=truncation)
        )
    return rollouts


def completion_texts(batch: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the completion of each row as text, without special tokens."""
    return [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(batch["input_ids"].cpu(), batch["completion_mask"].cpu(), strict=True)
    ]
