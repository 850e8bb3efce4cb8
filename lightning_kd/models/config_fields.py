"""Configurations of models: their fields exist, and their sizes make a model."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_ABOUT = {"auto_map", "task_specific_params", "n_ctx", "transformers_version"}
"""Fields of saved files that say nothing of the architecture; so do those with an underscore."""

_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
}


def read_config(config: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return the fields of a configuration, given as a mapping or as the path of a JSON file.

    Raises:
        ValueError: If the file cannot be read, or there is no ``model_type``.
    """
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config is not a readable JSON file: {error}; give the path of a config.json, or "
                "the fields themselves"
            ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(
            f"config lacks model_type: got {config!r}; give for example "
            "{model_type: llama, hidden_size: 128, num_hidden_layers: 3, ...}"
        )
    return dict(config)


def make_config(
    fields: Mapping[str, Any], of_tokenizer: Mapping[str, Any], role: str
) -> PretrainedConfig:
    """Build a configuration all of whose fields are read.

    transformers takes any name: a misspelt one becomes an attribute that nothing reads, and the
    field that was meant keeps its default.

    Args:
        fields: ``model_type`` and fields of that type, under any name that transformers has for them.
        of_tokenizer: Vocabulary and special ids, for the language model where it is part of another.
        role: Of the model, for messages.

    Raises:
        ValueError: If a field does not exist, or a size is not positive.
    """
    own = dict(fields)
    model_type = own.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), 3)
        raise ValueError(
            f"config of the {role} is not understood: transformers has no model_type {model_type!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    kind = CONFIG_MAPPING[model_type]
    _check_sizes(own, kind.attribute_map, role)
    if "text_config" in {field.name for field in dataclasses.fields(kind)}:
        own["text_config"] = {**of_tokenizer, **(own.get("text_config") or {})}
    else:
        own = {**of_tokenizer, **own}
    try:
        config = AutoConfig.for_model(model_type, **own)
    except (TypeError, ValueError, AttributeError, ImportError, StrictDataclassError) as error:
        raise ValueError(f"config of the {role} is not understood: {error}") from error
    for name, advice in _unread(config, own):
        raise ValueError(f"config of the {role}: nothing reads the field {name!r}; {advice}")
    return config


def _check_sizes(fields: Mapping[str, Any], aliases: Mapping[str, str], role: str) -> None:
    sizes = _SIZES | {aliases[name] for name in _SIZES & aliases.keys()}
    for name in sorted(sizes & fields.keys()):
        value = fields[name]
        if isinstance(value, int) and value < 1:
            raise ValueError(f"config of the {role}: {name} is {value}; it must be 1 or more")


def _unread(config: PretrainedConfig, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the fields that nothing reads, each with what to do about it."""
    common = {field.name for field in dataclasses.fields(PretrainedConfig)}
    known = {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys()
    known |= signature(type(config).__init__).parameters.keys() - {"self", "kwargs"}
    generation = GenerationConfig().to_dict()
    for name, value in fields.items():
        nested = getattr(config, name, None)
        if isinstance(nested, PretrainedConfig) and isinstance(value, dict):
            for inner, advice in _unread(nested, value):
                yield f"{name}.{inner}", advice
        elif name in known or name in _ABOUT or name.startswith("_"):
            continue
        # What a class understands under an older name, it does not keep as an attribute.
        elif name in vars(config):
            near = get_close_matches(name, sorted(known), 1)
            own = f"{config.model_type} has {', '.join(sorted(known - common))}"
            yield name, f"did you mean {near[0]}?" if near else own
        elif name in generation and not hasattr(config, name):
            yield name, "how completions are generated is said under model.generation"
