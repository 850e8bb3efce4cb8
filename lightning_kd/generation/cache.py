"""A preallocated key-value cache."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of a layer at the beginning of larger tensors.

    The layer it stands in for copies all that it holds for every token.

    Args:
        layer: A layer that has read the prompts.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._move(layer.keys, layer.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, and return all keys and values."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._all_keys.shape[-2]:
            self._move(self.keys, self.values)
        self._all_keys[..., before:after, :] = key_states
        self._all_values[..., before:after, :] = value_states
        self.keys, self.values = self._all_keys[..., :after, :], self._all_values[..., :after, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._move(self.keys[indices], self.values[indices])

    def _move(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[-2]
        self._all_keys, self._all_values = _with_spare_length(keys), _with_spare_length(values)
        self.keys = self._all_keys[..., :length, :]
        self.values = self._all_values[..., :length, :]


def _with_spare_length(values: Tensor) -> Tensor:
    """Return values at the beginning of a tensor with room for more."""
    *outer, length, width = values.shape
    larger = values.new_empty(*outer, _spare_length(length), width)
    larger[..., :length, :] = values
    return larger


def _spare_length(length: int) -> int:
    """Return a length that is half as long again, by at least 64 tokens."""
    return length + max(64, length // 2)


def allocated_length(prompt: int, generated: int) -> int:
    """Return the tokens that a preallocated cache has room for in the end.

    Args:
        prompt: Tokens that are read at once.
        generated: Tokens that follow; the last of them is not read.

    Example:
        >>> allocated_length(10, 20), allocated_length(10, 200)
        (74, 310)
    """
    length = _spare_length(prompt)
    while length < prompt + generated - 1:
        length = _spare_length(length)
    return length


def preallocated(cache: Any) -> Any:
    """Return a cache whose plain layers are preallocated; other layers stay as they are."""
    if isinstance(cache, DynamicCache):
        cache.layers = [
            PreallocatedLayer(layer)
            if type(layer) is DynamicLayer and layer.is_initialized
            else layer
            for layer in cache.layers
        ]
    return cache


def masks_unseen(cache: Any) -> None:
    """Have transformers build the mask of each further token without a look at what it masks.

    It looks whether a mask is needed at all, on the host, which waits for the device. Of a cache that
    calls itself compileable it takes for granted that one is.
    """
    for layer in getattr(cache, "layers", ()):
        layer.is_compileable = True


def can_drop_rows(cache: Any) -> bool:
    """Return whether rows can be removed; from a recurrent state they cannot."""
    plain = {PreallocatedLayer, DynamicLayer, DynamicSlidingWindowLayer}
    return isinstance(cache, DynamicCache) and all(type(x) in plain for x in cache.layers)


def leave_inference_mode(model: torch.nn.Module) -> None:
    """Make ordinary tensors of buffers that a forward pass in inference mode has replaced.

    Rotary embeddings that follow the length do so; the backward pass would refuse them.
    """
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(part, name, buffer.clone())
