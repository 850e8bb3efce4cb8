"""A key-value cache whose tensors stay where they are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)


class FixedLayer(StaticLayer):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of a layer in tensors that stay where they are, with room for more tokens.

    How many columns are filled is a number on the device, so that a step which appends a token can be
    recorded and repeated. A layer with a sliding window keeps all columns too; its mask hides those
    before the window. (That of transformers counts its columns on the host.)

    Args:
        layer: A layer that has read the prompts.
        length: Columns that there will be room for.
    """

    keys: Tensor
    values: Tensor
    max_cache_len: int

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__(length)
        filled = layer.get_seq_length()
        self.is_sliding = layer.is_sliding
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.cumulative_length = torch.full((), filled, device=self.device)
        # What is masked must be finite: nothing times NaN is NaN.
        around = (0, 0, filled - layer.keys.shape[-2], length - filled)
        self.keys, self.values = F.pad(layer.keys, around), F.pad(layer.values, around)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, and return all columns."""
        # Under autocast a layer keeps wider values than it is given.
        states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        kept: tuple[Tensor, Tensor] = super().update(*states)
        return kept

    def grow(self, length: int) -> None:
        """Make room for so many columns."""
        behind = (0, 0, 0, length - self.max_cache_len)
        self.keys, self.values = F.pad(self.keys, behind), F.pad(self.values, behind)
        self.max_cache_len = length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self.keys, self.values = self.keys[indices], self.values[indices]


def fixed(cache: Any, length: int, model: str) -> Any:
    """Return a cache with fixed layers, which has read the prompts.

    Args:
        cache: That of a model.
        length: Columns that there will be room for.
        model: Name of the model, for the message.

    Raises:
        ValueError: If a layer keeps something else than keys and values.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) else [cache]
    others = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others:
        kept = " and ".join(sorted(kind.__name__ for kind in others))
        raise ValueError(
            f"{model} keeps {kept} while it generates, which is not known to stay where it is; set "
            "cache: dynamic of CachedSampler"
        )
    cache.layers = [FixedLayer(x, length) if x.is_initialized else x for x in layers]
    for layer in cache.layers:
        # One without keys of its own, which reads another's, must not say otherwise.
        layer.is_compileable = True
    return cache
