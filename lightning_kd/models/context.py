"""Longest sequence of a model."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_EXTENDED = {"linear", "yarn", "longrope"}
"""Kinds of rotary embeddings that read ``factor`` times as many tokens as they were trained on."""


def context_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that a model is made for, or None if there is no limit.

    Args:
        config: Of a causal language model, or of a model that has one.

    Example:
        >>> from transformers import GPT2Config, LlamaConfig, MambaConfig
        >>> context_length(GPT2Config()), context_length(MambaConfig())
        (1024, None)
        >>> rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        >>> context_length(LlamaConfig(max_position_embeddings=40960, rope_parameters=rope))
        131072
    """
    text: Any = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1 or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
    for kind in kinds:
        if kind.get("rope_type") == "dynamic":
            return None
        if kind.get("rope_type") in _EXTENDED and kind.get("factor"):
            trained = kind.get("original_max_position_embeddings") or length
            length = max(length, int(trained * kind["factor"]))
    return length
