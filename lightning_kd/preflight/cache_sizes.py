"""Size of the keys and values that generation keeps."""

from copy import deepcopy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel


def cache_bytes(model: PreTrainedModel, kept: tuple[torch.dtype, torch.dtype]) -> int | None:
    """Return bytes of the keys and values of one token; None if the configuration does not tell.

    Args:
        model: A model, without weights.
        kept: Types of its keys and values.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(
        config, "num_attention_heads", None
    )
    layers, hidden = config.num_hidden_layers, getattr(config, "hidden_size", None)
    width = getattr(config, "head_dim", None)
    if width is None and hidden and heads:
        width = hidden // config.num_attention_heads
    if not heads or not width:
        return None
    return int(layers) * int(heads) * int(width) * sum(each.itemsize for each in kept)


def kept_types(
    model: PreTrainedModel, mixed: torch.dtype
) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the types of keys and values that a model keeps under autocast.

    That depends on how it rotates keys. One layer of it reads a few tokens, all without numbers.

    Args:
        model: A model, without weights.
        mixed: The type that autocast computes in.

    Returns:
        None if it cannot be built or run so; the type of its weights is then the most.
    """
    config = deepcopy(model.config)
    config.get_text_config().num_hidden_layers = 1
    try:
        with (
            torch.random.fork_rng(devices=[]),
            FakeTensorMode(),
            torch.device("cpu"),
            torch.autocast("cpu", mixed),
            torch.no_grad(),
        ):
            layer = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
            kept = layer(torch.zeros(1, 4, dtype=torch.long), use_cache=True).past_key_values
            first: Any = kept.layers[0]
            return first.keys.dtype, first.values.dtype
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None
