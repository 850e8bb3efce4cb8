"""A decoder whose step can be recorded and repeated."""

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_kd.generation.cache import spare_length
from lightning_kd.generation.decoder import Decoder
from lightning_kd.generation.static_cache import FixedLayer, fixed
from lightning_kd.models.adapters import without_adapters
from lightning_kd.models.rotary import follows_length
from lightning_kd.models.sharding import is_sharded

_LOOKS = {"xglm"}
"""Types of model whose forward pass branches on a tensor, of which transformers says nothing."""


class StaticDecoder(Decoder):
    """A model and its key-value cache in tensors that stay where they are, for one batch of prompts.

    Until rows leave or the cache grows, :meth:`append` is a function of tensors alone: it can be
    recorded. The mask has all columns; those that are not filled yet are masked as what comes later.

    Args:
        model: A model without a :func:`static_obstacle`.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        longest: Most tokens that are generated.

    Raises:
        ValueError: If a layer keeps something else than keys and values.
    """

    _length: int

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, longest: int
    ) -> None:
        self._prompt_mask = prompt_mask
        # The last token is not read.
        self._most = prompt_mask.shape[1] + longest - 1
        super().__init__(model, prompt_ids, prompt_mask)

    def append(self, tokens: Tensor) -> None:
        """Read one more token of each row, ``(rows,)``."""
        self.logits = self._forward(tokens[:, None], self._position)
        self._position.add_(1)

    def grow(self) -> None:
        """Make room for more tokens."""
        before, self._length = self._length, min(spare_length(self._length), self._most)
        self.room = self._length - before
        assert self._mask is not None  # it has all columns from the beginning
        self._mask = F.pad(self._mask, (0, self.room), value=1)
        for layer in self._cache.layers:
            if isinstance(layer, FixedLayer):
                layer.grow(self._length)

    def _make_room(self) -> None:
        prompt = self._prompt_mask.shape[1]
        self._length = min(spare_length(prompt), self._most)
        self._cache = fixed(self._cache, self._length, type(self.model).__name__)
        self.room = self._length - prompt
        """Tokens for which there was room when the cache was made or has last grown."""
        self._mask = F.pad(self._prompt_mask, (0, self.room), value=1)


def static_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model cannot generate with a static cache, or None if it can.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2)
        >>> static_obstacle(MambaForCausalLM(config))
        'it keeps something else than keys and values'
    """
    inner = without_adapters(model)
    config = inner.config.get_text_config(decoder=True)
    quantizer = getattr(inner, "hf_quantizer", None)
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    obstacles = {
        "it is in shards, which all processes gather together": is_sharded(model),
        "it is on several devices": len({p.device for p in inner.parameters()}) > 1,
        "it keeps something else than keys and values": bool(
            layers - {DynamicLayer, DynamicSlidingWindowLayer}
        ),
        "transformers knows it not to work with one": not inner._can_compile_fullgraph,
        "it looks at values while it reads": config.model_type in _LOOKS,
        "its quantized weights are unpacked on the host": quantizer is not None
        and not quantizer.is_compileable,
        "its rotary embeddings follow the length": follows_length(inner),
        "flash attention reads no columns that are not filled": "flash"
        in str(config._attn_implementation),
    }
    return next((reason for reason, there in obstacles.items() if there), None)
