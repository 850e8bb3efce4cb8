"""Weights that are whole only a few at a time, and what one knows of them meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

Pieces = Iterator[tuple[AbstractContextManager[object], Sequence[Tensor]]]
"""What makes some weights whole while it is open, and which ones."""

_WRAPPED = "_fsdp_wrapped_module."
"""What FSDP1 adds to the names of a unit's weights."""


def shape_of(weight: Tensor) -> Sequence[int]:
    """The shape of a weight, also where nothing but a share of a flat row is left of it here."""
    for noted in ("ds_shape", "full_shape"):  # by DeepSpeed, by our FSDP1
        if hasattr(weight, noted):
            shape: Sequence[int] = getattr(weight, noted)
            return shape
    return weight.shape


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of all weights, under their names in a state dict."""
    return {n.replace(_WRAPPED, ""): list(shape_of(w)) for n, w in model.named_parameters()}


def collected(model: nn.Module, pieces: Pieces, *, wanted: bool) -> dict[str, Tensor]:
    """What the state dict of a model has, copied to memory of the CPU piece by piece.

    Args:
        model: Has the names. What goes by several of them is copied once.
        pieces: All of its weights; every process has to go through them.
        wanted: False where the others are only helped.
    """
    copies: dict[Tensor, Tensor] = {}
    for whole, tensors in pieces:
        with whole:
            copies |= {t: t.detach().cpu().clone() for t in tensors if wanted}
    if not wanted:
        return {}
    names = {name.replace(_WRAPPED, ""): tensor for name, tensor in _persistent(model)}
    return {name: copies[t] if t in copies else t.cpu() for name, t in names.items()}


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and persistent buffers: a state dict without the hooks that others have put on it."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, part in model.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer
