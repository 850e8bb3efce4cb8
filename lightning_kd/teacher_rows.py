"""Rows as a teacher reads them: another prompt, with privileged text, before the same completions."""

from collections.abc import Sequence
from typing import cast

import torch

from lightning_kd.batch import (
    IGNORE_INDEX,
    Batch,
    PromptBatch,
    TeacherRows,
    has_prompts,
    pad_rows,
)
from lightning_kd.scoring import ScoredPositions

_OF_THE_STUDENTS_ROWS = {
    *("teacher", "completion_mask"),
    *("log_probs", "sampling_log_probs", "advantages"),
}
"""Fields of a batch that stand at tokens of its rows, which the teacher's rows have elsewhere."""


def teacher_rows(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> TeacherRows:
    """Return rows of prompts and completions, as a teacher reads them.

    Args:
        prompts: Tokens of each row's prompt.
        completions: Tokens of each row's completion.
        pad_id: Fills up the rows.

    Example:
        >>> teacher_rows([[5, 6, 7]], [[8]], 0)["input_ids"].tolist()
        [[5, 6, 7, 8]]
    """
    rows = [[*prompt, *rest] for prompt, rest in zip(prompts, completions, strict=True)]
    return {
        "input_ids": pad_rows(rows, pad_id),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
        "prompt_ids": pad_rows(prompts, pad_id, left=True),
        "prompt_mask": pad_rows([[1] * len(row) for row in prompts], 0, left=True),
    }


def has_teacher_rows(batch: Batch) -> bool:
    """Return whether the teacher reads other prompts than the student."""
    return "teacher" in batch


def as_teacher_reads(batch: Batch, positions: ScoredPositions) -> tuple[Batch, ScoredPositions]:
    """Return a batch and its scored positions as its teacher reads them.

    A token of a completion is predicted from the token before it, in the student's row and in the
    teacher's: so each position moves by as much as the teacher's prompt is longer.

    Args:
        batch: A micro-batch; one whose teacher reads the same rows is returned as it is.
        positions: Its scored positions, all of which predict tokens of completions.

    Returns:
        The teacher's rows with labels where they are scored, and as many positions in the same order.

    Example:
        >>> prompt = {"prompt_ids": torch.tensor([[5]]), "prompt_mask": torch.tensor([[1]])}
        >>> ids, labels = torch.tensor([[5, 8]]), torch.tensor([[-100, 8]])
        >>> teacher = teacher_rows([[3, 4, 5]], [[8]], pad_id=0)
        >>> batch = {"input_ids": ids, "labels": labels, **prompt, "teacher": teacher}
        >>> read, scored = as_teacher_reads(batch, ScoredPositions.from_labels(labels))
        >>> read["input_ids"].tolist(), read["labels"].tolist(), scored.places.tolist()
        ([[3, 4, 5, 8]], [[-100, -100, -100, 8]], [2])
    """
    if not has_teacher_rows(batch):
        return batch, positions
    prompts = cast(PromptBatch, batch)
    teacher = prompts["teacher"]
    ids, rows = teacher["input_ids"], positions.rows
    longer = teacher["prompt_mask"].sum(-1) - prompts["prompt_mask"].sum(-1)
    wider = ids.shape[1] - positions.mask.shape[1]
    places = positions.places + rows * wider + longer[rows]
    mask = torch.zeros_like(ids, dtype=torch.bool).flatten().index_fill(0, places, value=True)
    key = None if positions.key is None else ("as the teacher reads", positions.key)
    scored = ScoredPositions(mask.view_as(ids), positions.targets, places, key)
    read = {
        **{name: value for name, value in batch.items() if name not in _OF_THE_STUDENTS_ROWS},
        **teacher,
        "labels": scored.at_tokens(scored.targets - IGNORE_INDEX) + IGNORE_INDEX,
    }
    return cast(Batch, read), scored


def check_teacher_rows(batch: Batch, positions: ScoredPositions) -> None:
    """Validate that the teacher reads the completions that are scored; looks at values.

    Raises:
        ValueError: If it reads others, or a token of a prompt is scored, which it does not read.
    """
    if not has_teacher_rows(batch):
        return
    if not has_prompts(batch):
        raise ValueError(
            "the batch has rows for the teacher and no prompts of its own (prompt_ids, prompt_mask), "
            "so that nobody knows where completions begin; give both, or leave teacher out"
        )
    column = positions.places % positions.mask.shape[1]
    early = column + 1 < batch["prompt_mask"].sum(-1)[positions.rows]
    if early.any():
        row = int(positions.rows[early][0])
        raise ValueError(
            f"row {row} is scored at token {int(column[early][0]) + 1}, in its prompt, and the teacher "
            "reads another prompt (data.teacher_prompt_template), so that it says nothing about it: "
            "take a method that learns from completions alone, or leave the template out"
        )
    own, theirs = (
        rows["attention_mask"].sum(-1) - rows["prompt_mask"].sum(-1)
        for rows in (batch, batch["teacher"])
    )
    other = own != theirs
    if not other.any():
        read, scored = as_teacher_reads(batch, positions)
        found = read["input_ids"].flatten()[scored.places + 1]
        other = scored.scattered(found != scored.targets).any(-1)
    if other.any():
        raise ValueError(
            f"the teacher's row {int(other.nonzero()[0, 0])} has other tokens behind its prompt than "
            "the batch's: both must end with the same completion"
        )
