"""Weights that are unsharded only a few at a time, and their shapes meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

GatheredShards = Iterator[tuple[AbstractContextManager[object], Sequence[Tensor]]]
"""Contexts in which some weights are unsharded, each with these weights."""

_WRAPPED = "_fsdp_wrapped_module."
"""Prefix that FSDP1 adds to the names of a unit's weights."""


def shape_of(weight: Tensor) -> Sequence[int]:
    """Return the unsharded shape of a weight, also where this process has a share of a flat row."""
    for noted in ("ds_shape", "full_shape"):  # by DeepSpeed, by our FSDP1
        if hasattr(weight, noted):
            shape: Sequence[int] = getattr(weight, noted)
            return shape
    return weight.shape


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the unsharded shapes of all weights, under their names in a state dict."""
    return {n.replace(_WRAPPED, ""): list(shape_of(w)) for n, w in model.named_parameters()}


def gather_state_dict(
    model: nn.Module, shards: GatheredShards, *, wanted: bool
) -> dict[str, Tensor]:
    """Copy the state dict of a model to CPU memory, a few weights at a time.

    Args:
        model: Has the names. A weight with several of them is copied once.
        shards: All of its weights; every process has to go through them.
        wanted: False on processes that only help to gather, which return nothing.
    """
    copies: dict[Tensor, Tensor] = {}
    for unsharded, tensors in shards:
        with unsharded:
            copies |= {t: t.detach().cpu().clone() for t in tensors if wanted}
    if not wanted:
        return {}
    names = {name.replace(_WRAPPED, ""): tensor for name, tensor in _persistent(model)}
    return {name: copies[t] if t in copies else t.cpu() for name, t in names.items()}


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and persistent buffers, without the state-dict hooks that others have added."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, part in model.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer
