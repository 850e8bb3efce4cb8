"""A preallocated key-value cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_kd.generation.static_cache import FixedLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of a layer in larger tensors, with room for more tokens behind them.

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
        if self._end + key_states.shape[-2] > self._all_keys.shape[-2]:
            self._move(self.keys, self.values)
        begin, before = self._end - self.keys.shape[-2], self._end
        self._end += key_states.shape[-2]
        self._all_keys[..., before : self._end, :] = key_states
        self._all_values[..., before : self._end, :] = value_states
        self.keys = self._all_keys[..., begin : self._end, :]
        self.values = self._all_values[..., begin : self._end, :]
        return self.keys, self.values

    def fit(self, columns: int) -> None:
        """Keep so many columns: without the first ones, or with zeros in front."""
        missing = columns - self.keys.shape[-2]
        if missing > 0:
            in_front = (0, 0, missing, 0)
            self._move(F.pad(self.keys, in_front), F.pad(self.values, in_front))
        else:
            self.keys, self.values = self.keys[..., -columns:, :], self.values[..., -columns:, :]

    def put(self, rows: Tensor, layer: "PreallocatedLayer") -> None:
        """Replace the last columns of some rows by all that another layer holds."""
        first = self.keys.shape[-2] - layer.keys.shape[-2]
        self.keys[rows, :, first:] = layer.keys
        self.values[rows, :, first:] = layer.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._move(self.keys[indices], self.values[indices])

    def _move(self, keys: Tensor, values: Tensor) -> None:
        self._end = length = keys.shape[-2]
        self._all_keys, self._all_values = _withspare_length(keys), _withspare_length(values)
        self.keys = self._all_keys[..., :length, :]
        self.values = self._all_values[..., :length, :]


def _withspare_length(values: Tensor) -> Tensor:
    """Return values at the beginning of a tensor with room for more."""
    *outer, length, width = values.shape
    larger = values.new_empty(*outer, spare_length(length), width)
    larger[..., :length, :] = values
    return larger


def spare_length(length: int) -> int:
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
    length = spare_length(prompt)
    while length < prompt + generated - 1:
        length = spare_length(length)
    return length


def longest_allocation(prompt: int, generated: int) -> int:
    """Return the tokens that a preallocated cache has room for at most, whenever it is moved.

    Example:
        >>> longest_allocation(10, 20), longest_allocation(10, 200)
        (93, 313)
    """
    return spare_length(prompt + generated - 1)


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
    plain = {PreallocatedLayer, FixedLayer, DynamicLayer, DynamicSlidingWindowLayer}
    return isinstance(cache, DynamicCache) and all(type(x) in plain for x in cache.layers)


@contextmanager
def ordinary_buffers(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Make ordinary tensors in the end of buffers that were replaced in inference mode.

    Rotary embeddings that follow the length do so; the backward pass would refuse them. Inference mode
    is entered inside.
    """
    try:
        yield
    finally:
        for part in (part for model in models for part in model.modules()):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_inference():
                    setattr(part, name, buffer.clone())
