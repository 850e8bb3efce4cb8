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

from typing import Any, NotRequired, TypedDict

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
    sample: NotRequired[Tensor]
    """In training, number of the row's sample in the run's stream, ``(B,)``."""
    prompt_ids: NotRequired[Tensor]
    """The prompt alone, padded on the left for generation, ``(B, P)``."""
    prompt_mask: NotRequired[Tensor]
    """1 on the prompt's tokens, ``(B, P)``."""
    prompt: NotRequired[list[str]]
    """The prompt's text, one per row."""
    completion: NotRequired[list[str]]
    """The reference completion's text, one per row."""
    extra: NotRequired[dict[str, list[Any]]]
    """Further columns of the data, one value per row each."""
    completion_mask: NotRequired[Tensor]
    """In a rollout, True on the tokens that a model wrote, ``(B, T)``."""
    group: NotRequired[Tensor]
    """In a rollout, a number that completions of one prompt share, ``(B,)``."""
    log_probs: NotRequired[Tensor]
    """In a rollout, log-probability of each labeled token under the student that wrote it, at the
    sampling temperature, ``(B, T)``, at the token's own place."""
    sampling_log_probs: NotRequired[Tensor]
    """The same under the distribution it was drawn from, where a teacher was mixed in."""
    advantages: NotRequired[Tensor]
    """In a rollout, what a method gives its tokens for an advantage, ``(B, T)``."""
    text: NotRequired["Batch"]
    """A micro-batch of a second stream, for methods that also learn from plain text."""
