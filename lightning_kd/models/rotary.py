"""Rotary embeddings whose frequencies follow the length of the rows (dynamic NTK, longrope)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

_DYNAMIC, _LONG = "dynamic", "longrope"
_FIXED = "default"


def _kinds(part: Any) -> dict[str | None, str]:
    """Return the kinds of rotary embedding of a part of a model, by type of layer."""
    kind = getattr(part, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return {layer: name for layer, name in kinds.items() if isinstance(name, str)}


def follows_length(model: PreTrainedModel) -> bool:
    """Return whether a model's rotary embeddings look at the length of what it reads."""
    return own_length(model) is not None


def own_length(model: PreTrainedModel) -> int | None:
    """Return the tokens beyond which a row changes the frequencies of all rows beside it.

    None where none does.
    """
    lengths = [
        _own_length(part, layer, kind)
        for part in model.modules()
        for layer, kind in _kinds(part).items()
        if _DYNAMIC in kind or kind == _LONG
    ]
    return min(lengths, default=None)


@contextmanager
def within_own_length(models: Sequence[PreTrainedModel], longest: int) -> Iterator[None]:
    """Have embeddings that follow the length not look at it, where no row is beyond their own.

    Transformers looks at each token whether it is the first beyond the length that a model was trained
    on, on the host, which waits for the device. Rows that cannot become so long need not be looked at.

    Args:
        models: Whose embeddings are left alone if rows can become longer, or the last ones were.
        longest: Tokens of the longest row, with all that may follow.
    """
    changed = []
    try:
        for part in (part for model in models for part in model.modules()):
            kinds: Any = _kinds(part)
            fixed = {
                layer: _FIXED if _DYNAMIC in kind and _unchanged(part, layer, longest) else kind
                for layer, kind in kinds.items()
            }
            if fixed != kinds:
                changed.append((part, part.rope_type))
                part.rope_type = fixed.get(None, fixed)
        yield
    finally:
        for part, kind in changed:
            part.rope_type = kind


def _own_length(part: Any, layer: str | None, kind: str) -> int:
    if kind != _LONG:
        return int(part.original_max_seq_len)
    parameters = part.config.rope_parameters
    of_layer = parameters if layer is None else parameters[layer]
    return int(of_layer["original_max_position_embeddings"])


def _unchanged(part: Any, layer: str | None, longest: int) -> bool:
    """Return whether frequencies are those of the own length, and stay so."""
    name = "max_seq_len_cached" if layer is None else f"{layer}_max_seq_len_cached"
    reached = getattr(part, name, part.max_seq_len_cached)
    return max(longest, int(reached)) <= int(part.original_max_seq_len)
