"""Rollouts: completions as batches to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, PromptBatch, Rollout, TeacherRows
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
    rows = _JoinedRows.of(batch["prompt_mask"], completions)
    lost = ~completions.ended & (truncation != "keep")
    labeled = rows.completion & ~lost[:, None]
    ids = rows.join(batch["prompt_ids"], completions.ids, pad_id, rows.real)
    written = {
        "input_ids": ids,
        "attention_mask": rows.real.long(),
        "labels": ids.masked_fill(~labeled, IGNORE_INDEX),
        "completion_mask": rows.completion,
        "group": batch["sample"] // group_size,
        "ended": completions.ended,
    }
    # Found here, once for a window: in each step the host would wait for the device.
    ScoredPositions.from_labels(written["labels"])
    rewritten = cast(Rollout, {**batch, **written})
    if completions.log_probs is not None and completions.sampling_log_probs is not None:
        zeros = torch.zeros_like(batch["prompt_mask"], dtype=completions.log_probs.dtype)
        rewritten["log_probs"] = rows.join(zeros, completions.log_probs, 0, labeled)
        rewritten["sampling_log_probs"] = rows.join(
            zeros, completions.sampling_log_probs, 0, labeled
        )
    if truncation == "drop":
        rewritten["row"] = batch["row"].masked_fill(lost, FILLER_ROW)
    if "teacher" in batch:
        rewritten["teacher"] = _as_teacher_reads(batch["teacher"], completions, pad_id)
    return rewritten


def _as_teacher_reads(rows: TeacherRows, completions: Completions, pad_id: int) -> TeacherRows:
    """Return the teacher's prompts with other completions."""
    joined = _JoinedRows.of(rows["prompt_mask"], completions)
    ids = joined.join(rows["prompt_ids"], completions.ids, pad_id, joined.real)
    return {**rows, "input_ids": ids, "attention_mask": joined.real.long()}


@dataclass(frozen=True)
class _JoinedRows:
    """Rows of a prompt, padded on the left, and a completion, padded on the right, without a gap."""

    source: Tensor
    """Where each token of a row stands in both beside each other, ``(B, T)``."""
    real: Tensor
    """True on tokens, ``(B, T)``."""
    completion: Tensor
    """True on those of the completion, ``(B, T)``."""

    @classmethod
    def of(cls, prompt_mask: Tensor, completions: Completions) -> Self:
        starts, lengths = prompt_mask.sum(-1), completions.mask.sum(-1)
        rows, width = len(prompt_mask), int((starts + lengths).max())
        # Row by row: leave out the padding on the left, read on to the end of the completion.
        place = torch.arange(width, device=prompt_mask.device).expand(rows, -1)
        source = (place + (prompt_mask.shape[1] - starts)[:, None]).clamp(
            max=prompt_mask.shape[1] + completions.ids.shape[1] - 1
        )
        real = place < (starts + lengths)[:, None]
        return cls(source, real, real & (place >= starts[:, None]))

    def join(self, of_prompt: Tensor, of_completion: Tensor, fill: float, where: Tensor) -> Tensor:
        values = torch.cat([of_prompt, of_completion], -1).gather(-1, self.source)
        return values.masked_fill(~where, fill)


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
