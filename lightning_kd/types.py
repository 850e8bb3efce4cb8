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

from typing import NotRequired, TypedDict

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not trained on: prompts, padding, filler rows."""

FILLER_ROW = -1
"""``Batch["row"]`` of a row that only fills up a batch: nothing in it is scored or counted."""


class Batch(TypedDict):
    """A padded micro-batch, as the loaders yield it and every module reads it."""

    input_ids: Tensor
    """Prompt and completion, padded on the right, ``(B, T)``."""
    attention_mask: Tensor
    """1 on real tokens, 0 on padding, ``(B, T)``."""
    labels: Tensor
    """Unshifted targets, :data:`IGNORE_INDEX` where not trained, ``(B, T)``."""
    row: Tensor
    """Number of the row in its data set, ``(B,)``; :data:`FILLER_ROW` for filler."""
    prompt_ids: NotRequired[Tensor]
    """The prompt alone, padded on the left for generation, ``(B, P)``."""
    prompt_mask: NotRequired[Tensor]
    """1 on the prompt's tokens, ``(B, P)``."""
    prompt: NotRequired[list[str]]
    """The prompt's text, one per row."""
    completion: NotRequired[list[str]]
    """The reference completion's text, one per row."""
