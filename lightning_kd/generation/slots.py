"""A causal language model that rows enter and leave at different times."""

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lightning_kd.generation.cache import PreallocatedLayer, masks_unseen
from lightning_kd.generation.decoder import Decoder, tokens_between_looks
from lightning_kd.generation.token_positions import check_cache, check_late_rows
from lightning_kd.models.adapters import without_adapters


class SlotDecoder(Decoder):
    """A model and its key-value cache for a number of slots, with a row in each.

    All slots read their next token together, into one new column of the cache. A row that enters has
    its prompt in the columns just before, and what an earlier row left in front of it is masked.

    Args:
        model: A causal language model all of whose layers keep keys and values of all tokens.
        prompt_ids: Prompts of the first rows, padded on the left, ``(slots, P)``.
        prompt_mask: 1 on real tokens, ``(slots, P)``.
        last_position: Of any row's tokens. A row that has ended and still is in its slot stays there.

    Raises:
        ValueError: If a layer keeps something else, such as a window or a recurrent state, or a
            token's place is told from its column.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, last_position: int
    ) -> None:
        super().__init__(model, prompt_ids, prompt_mask)
        check_late_rows(model)
        self._last_position = last_position
        layers = self._cache.layers if isinstance(self._cache, DynamicCache) else [self._cache]
        # Of a layer that reads another one's keys there is nothing.
        empty = [x for x in layers if type(x) is DynamicLayer and not x.is_initialized]
        self._layers = [x for x in layers if type(x) is PreallocatedLayer]
        if len(self._layers) + len(empty) < len(layers):
            raise _other_layers(
                model, {type(x) for x in layers} - {PreallocatedLayer, DynamicLayer}
            )

    def append(self, tokens: Tensor) -> None:
        """Read one more token in each slot, ``(slots,)``."""
        super().append(tokens)
        self._position = self._position.clamp(max=self._last_position)

    def fit(self, columns: int) -> None:
        """Keep so many of the last columns; what is new in front is masked."""
        if self._mask is not None:
            # A negative number of columns is taken away.
            self._mask = F.pad(self._mask, (columns - self._mask.shape[-1], 0))
        for layer in self._layers:
            layer.fit(columns)

    def enter(self, slots: Tensor, rows: Decoder, columns: int) -> None:
        """Put rows that have read their prompts where others have ended.

        Args:
            slots: Slot of each of the rows, ``(rows,)``.
            rows: Of the same model.
            columns: That the longest row in any slot has tokens in, these rows included.
        """
        if self._mask is None:
            held = self._layers[0].keys.shape[-2]
            self._mask = self._position.new_ones(len(self._position), held)
            if tokens_between_looks(self._mask.device) > 1:
                masks_unseen(self._cache)
        self.fit(columns)
        theirs = [x for x in rows._cache.layers if type(x) is PreallocatedLayer]
        for own, other in zip(self._layers, theirs, strict=True):
            own.put(slots, other)
        prompt = theirs[0].keys.shape[-2]
        real = rows._mask if rows._mask is not None else self._mask.new_ones(len(slots), prompt)
        self._mask[slots] = F.pad(real, (columns - prompt, 0)).to(self._mask)
        self._position[slots] = rows._position
        self.logits[slots] = rows.logits

    def keep(self, rows: Tensor) -> None:
        """Keep these slots only."""
        super().keep(rows)
        self.logits = self.logits[rows]


def check_slots(model: PreTrainedModel) -> None:
    """Refuse a model that no row can enter late, before it has read anything.

    Raises:
        ValueError: If it keeps something else than the keys and values of all tokens, or a token's
            place is told from its column.
    """
    check_cache(model)
    check_late_rows(model)
    inner = without_adapters(model)
    layers = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    others = {type(layer) for layer in layers} - {DynamicLayer}
    if others:
        raise _other_layers(model, others)


def _other_layers(model: PreTrainedModel, kinds: Collection[type]) -> ValueError:
    """Return the error for a model that does not keep the keys and values of all tokens."""
    kept = " and ".join(sorted(kind.__name__ for kind in kinds))
    return ValueError(
        "ContinuousBatchingSampler puts a row's keys and values behind those of the row that "
        f"had its slot before, and {type(model).__name__} keeps {kept} (a "
        "sliding window, or a recurrent state); choose engine: CachedSampler"
    )
