"""Names and shapes that every part of the library shares.

Shape legend, used in docstrings throughout:

=====  =======================================================================
``B``  rows of a micro-batch
``T``  tokens of a padded row (prompt and completion)
``P``  tokens of a padded prompt
``V``  vocabulary
``N``  scored positions of a micro-batch, all rows flattened in row order
=====  =======================================================================

A *scored position* is one whose logits enter the loss. ``labels`` are unshifted, so the logits at
``t`` are scored when ``labels[:, t + 1]`` is a token and not :data:`IGNORE_INDEX`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeGuard, TypeVar, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_kd.devices import clone

IGNORE_INDEX = -100
"""Label of a token that is not trained on: prompts, padding, filler rows."""

TEACHER_PROMPT = "teacher_prompt"
"""Column of ``Batch["extra"]``: the prompt as the template of a teacher with other tokens has it."""

TEACHER_END = "teacher_end"
"""Column of ``Batch["extra"]``: the token with which that template ends an answer; empty for none."""

FILLER_ROW = -1
"""``Batch["row"]`` of a row that only fills up a batch: nothing in it is scored or counted."""


class Batch(TypedDict):
    """A padded micro-batch of rows, as the loaders yield it and every module reads it."""

    input_ids: Tensor
    """Prompt and completion, padded on the right, ``(B, T)``."""
    attention_mask: Tensor
    """1 on real tokens, 0 on padding, ``(B, T)``."""
    labels: Tensor
    """Unshifted targets, :data:`IGNORE_INDEX` where not trained, ``(B, T)``."""
    row: Tensor
    """Number of the row in its data set, ``(B,)``; -1 for filler."""
    sample: NotRequired[Tensor]
    """In training, number of the row's sample in the run's stream, ``(B,)``."""
    tokenized_apart: NotRequired[Tensor]
    """True for rows whose labeled tokens were tokenized as texts of their own, ``(B,)``; False is for
    rows that are one text."""
    document: NotRequired[Tensor]
    """Number of the row in the data as given, ``(B,)``, where rows were dropped or are windows of
    documents."""
    extra: NotRequired[dict[str, list[Any]]]
    """Further columns of the data, one value per row each."""


_Batch = TypeVar("_Batch", bound=Batch)


class TeacherRows(TypedDict):
    """Rows as a teacher reads them: other prompts before the same completions.

    Their rows are those of the batch, of another length: ``T`` and ``P`` are their own.
    """

    input_ids: Tensor
    """Prompt and completion, padded on the right, ``(B, T)``."""
    attention_mask: Tensor
    """1 on real tokens, ``(B, T)``."""
    prompt_ids: Tensor
    """The prompt alone, padded on the left, ``(B, P)``."""
    prompt_mask: Tensor
    """1 on the prompt's tokens, ``(B, P)``."""


class PromptBatch(Batch):
    """A micro-batch whose rows are prompts and completions; those of packed text are not."""

    prompt_ids: Tensor
    """The prompt alone, padded on the left for generation, ``(B, P)``."""
    prompt_mask: Tensor
    """1 on the prompt's tokens, ``(B, P)``."""
    prompt: list[str]
    """The prompt's text, one per row."""
    completion: list[str]
    """The reference completion's text, one per row."""
    references: NotRequired[list[list[str]]]
    """The texts that each row's completion is compared with, where they are others than the reference
    alone; none for a row that has no reference."""
    teacher: NotRequired[TeacherRows]
    """What the teacher reads, where it is told more than the student (a solution, feedback)."""


class Rollout(PromptBatch):
    """A micro-batch whose completions a model generated; ``completion`` remains the reference."""

    completion_mask: Tensor
    """True on the generated tokens, ``(B, T)``."""
    group: Tensor
    """A number that completions of one prompt share, ``(B,)``."""
    ended: NotRequired[Tensor]
    """True for completions whose last token is one that generation ends with, ``(B,)``."""
    log_probs: NotRequired[Tensor]
    """If the engine tells, log-probability of each labeled token under the model that generated it, at
    the sampling temperature, ``(B, T)``, at the token's own position."""
    sampling_log_probs: NotRequired[Tensor]
    """The same under the distribution it was sampled from, where a teacher was mixed in."""
    advantages: NotRequired[Tensor]
    """The advantage of each token, if the method computes it for whole windows, ``(B, T)``."""


class PairedBatch(Batch):
    """A micro-batch with one of a second stream, for methods that also learn from plain text."""

    text: Batch
    """The micro-batch of plain text, with as many rows."""


def check_batch(batch: object) -> None:
    """Validate that a batch has what every method reads.

    Raises:
        ValueError: If it has not.

    Example:
        >>> check_batch({"input_ids": [1, 2]})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: a batch needs input_ids, attention_mask and labels: integer tensors of one shape ...
    """
    named = {}
    if isinstance(batch, Mapping):
        named = {name: batch.get(name) for name in ("input_ids", "attention_mask", "labels")}
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    whole = [tensor for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()]
    if len(whole) < 3 or len({tensor.shape for tensor in whole}) > 1:
        came = {
            name: (str(value.dtype), *value.shape)
            if isinstance(value, Tensor)
            else type(value).__name__
            for name, value in named.items()
        }
        raise ValueError(
            "a batch needs input_ids, attention_mask and labels: integer tensors of one shape (rows, "
            "tokens), with labels -100 where nothing is trained on; got "
            f"{came or type(batch).__name__}"
        )


def check_contents(batch: Batch) -> None:
    """Validate padding and labels of a batch, and that it has no inputs that no model is given.

    Raises:
        ValueError: If rows are not padded on the right, labels are other tokens than the row's, padding
            has labels, or positions come along.
    """
    unread = {"position_ids", "token_type_ids", "inputs_embeds"} & batch.keys()
    if unread:
        raise ValueError(
            f"the batch has {', '.join(sorted(unread))}, which is not read: models get input_ids and "
            "attention_mask. Leave it out"
        )
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError(
            "the attention_mask is 0 before a 1: rows that are trained on or evaluated are padded on "
            "the right, so that positions count from the first token"
        )
    if ((labels != IGNORE_INDEX) & (mask == 0)).any():
        raise ValueError(
            f"there are labels on padding, where attention_mask is 0; they must be {IGNORE_INDEX}"
        )
    other = (labels != IGNORE_INDEX) & (labels != ids)
    if other.any():
        row, place = other.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has label {int(labels[row, place])} at token {place}, where input_ids has "
            f"{int(ids[row, place])}: labels are the token itself where it is trained on, and "
            f"{IGNORE_INDEX} elsewhere. They are not shifted, and tokens are not masked "
            "(DataCollatorForLanguageModeling with mlm=False)"
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Return rows of numbers as one tensor, padded on the right, or on the left, to the longest.

    Example:
        >>> pad_rows([[5, 6], [7]], 0).tolist(), pad_rows([[5, 6], [7]], 0, left=True).tolist()
        ([[5, 6], [7, 0]], [[5, 6], [0, 7]])
    """
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True) if left else zip(rows, fill, strict=True)
    return torch.tensor([[*a, *b] for a, b in pairs], dtype=torch.long)


def copy_of(batch: _Batch) -> _Batch:
    """Return a batch that may be changed, with tensors of its own."""
    return cast(_Batch, apply_to_collection(batch, Tensor, clone))


def has_prompts(batch: Batch) -> TypeGuard[PromptBatch]:
    """Return whether the rows of a batch are prompts and completions."""
    return "prompt_ids" in batch


def require_prompts(batch: Batch) -> PromptBatch:
    """Return a batch as one with prompts.

    Raises:
        ValueError: If it has none.
    """
    if not has_prompts(batch):
        raise ValueError(
            "the data has no prompts to complete (packed text has none); use a data module with "
            "prompts and completions"
        )
    return batch


def references_of(batch: PromptBatch) -> list[list[str]]:
    """Return the texts that the completion of each row is compared with.

    Example:
        >>> references_of({"completion": ["a", "b"]})
        [['a'], ['b']]
    """
    return batch.get("references") or [[text] for text in batch["completion"]]


def text_of(batch: Batch) -> Batch | None:
    """Return the micro-batch of plain text that comes with a batch, if one does."""
    return cast(PairedBatch, batch)["text"] if "text" in batch else None
