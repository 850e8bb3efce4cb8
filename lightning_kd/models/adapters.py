"""Adapters of peft, and merging them into weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

_IN_THE_CACHE = {"PREFIX_TUNING", "CARTRIDGE"}
"""Types of adapters whose virtual tokens are keys and values, and no logits."""


def has_adapters(model: PreTrainedModel) -> bool:
    """Return whether a model has adapters, wrapped by peft or added with ``add_adapter``."""
    return getattr(model, "peft_config", None) is not None


def without_adapters(model: PreTrainedModel) -> Any:
    """Return the model of transformers that peft has wrapped; a model that is not wrapped, itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def virtual_tokens(model: PreTrainedModel) -> str | None:
    """Return the type of adapters that put tokens of their own in front of each row, or None.

    These are the prompts, prefixes and cartridges of peft.
    """
    configs = model.peft_config.values() if has_adapters(model) else ()
    kinds = (c.peft_type.value for c in configs if getattr(c, "is_prompt_learning", False))
    return next(kinds, None)


def check_same_length(model: PreTrainedModel, role: str) -> None:
    """Refuse adapters with which a model gives logits of more tokens than it was given.

    Raises:
        ValueError: If it has some, for example prompts.
    """
    kind = virtual_tokens(model)
    if kind is not None and kind not in _IN_THE_CACHE:
        raise ValueError(
            f"the {role} has adapters of type {kind}, whose tokens come out in front of those of each "
            "row, where no label stands; use LoRA, or PREFIX_TUNING, whose tokens are keys and values "
            "alone"
        )


@contextmanager
def peft_as_it_is() -> Iterator[None]:
    """Leave out what transformers says of a name that only peft can mend."""
    with warnings.catch_warnings():
        renamed = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", renamed, FutureWarning)
        yield


def check_without_adapters(model: PreTrainedModel) -> None:
    """Refuse a model that has adapters, where others are to be added.

    Raises:
        ValueError: If it has some.
    """
    if has_adapters(model):
        raise ValueError(
            "lora is given for a model that has adapters already; leave lora out, or merge them"
        )


def check_mergeable(model: PreTrainedModel) -> None:
    """Refuse adapters that cannot become part of a model's weights.

    Raises:
        ValueError: If they are such, for example prompts.
    """
    wrapped = hasattr(model, "peft_type")
    if has_adapters(model) and wrapped and not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"the student has adapters of type {model.peft_type}, which cannot be merged into its "
            "weights, so that it could not be exported; train it with LoRA, or leave the export out"
        )


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the adapters into the weights of a model, which is changed in place."""
    if hasattr(model, "merge_and_unload"):
        merged: PreTrainedModel = model.merge_and_unload()
        return merged
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model
