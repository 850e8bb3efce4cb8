"""Switching off the dropout of a model in training mode."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

Setting = tuple[Any, str, Any]
"""An object, the name of its attribute, and the value to restore."""


def switch_off_dropout(model: nn.Module) -> list[Setting]:
    """Set every dropout probability of a model to 0, without changing its mode.

    In training mode gradient checkpointing goes on working, which evaluation mode switches off.
    Probabilities are those of dropout modules, of attributes that modules hand to functional
    dropout (``attention_dropout``, ``layerdrop``), and of the config where a layer reads it in its
    forward. The config that is saved with the model keeps its own.

    Args:
        model: A model of transformers, with or without adapters; it is changed in place.

    Returns:
        What :func:`restore` needs to undo it.
    """
    top: Any = model
    saved = [top, *([top.get_base_model()] if hasattr(top, "get_base_model") else [])]
    before: list[Setting] = []
    configs: dict[int, PretrainedConfig] = {}
    for part in model.modules():
        names = [name for name in vars(part) if _is_probability(name, part)]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            names = ["p"]
        for name in names:
            before.append((part, name, getattr(part, name)))
            setattr(part, name, 0.0)
        config = vars(part).get("config")
        if isinstance(config, PretrainedConfig) and all(part is not owner for owner in saved):
            before.append((part, "config", config))
            # Layers share a config; they go on sharing its copy.
            part.config = configs.setdefault(id(config), _without_dropout(config))
    return before


def restore(settings: list[Setting]) -> None:
    """Undo :func:`switch_off_dropout`."""
    for thing, name, value in settings:
        setattr(thing, name, value)


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode for a while; afterwards every part is in its earlier mode."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.train()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _is_probability(name: str, owner: object) -> bool:
    value = vars(owner)[name]
    return "drop" in name.lower() and type(value) is float and 0 < value <= 1


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    changed = copy.copy(config)
    for name in list(vars(changed)):
        if _is_probability(name, changed):
            setattr(changed, name, 0.0)
    return changed
