"""Loading of checkpoints that hold all weights of their architecture, and no others."""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import find_adapter_config_file

from lightning_kd.models.adapters import peft_as_it_is

_NO_WEIGHTS = re.compile(r"(^|\.)(masked_bias|inv_freq|cos_cached|sin_cached|position_ids)$")
"""Constants that older versions of transformers saved beside the weights, and compute today."""

_NAMED = 3
"""Weights of each kind that a message names."""


def load_checkpoint(name_or_path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model all of whose weights come from its checkpoint.

    transformers draws at random what a checkpoint lacks and drops what it has too much, with no more
    than a warning. Adapters of peft are merged into the model that they adapt, unless it is quantized.

    Args:
        name_or_path: A directory or a hub name.
        options: Those of ``from_pretrained``.

    Raises:
        ValueError: If weights are missing, are not part of the architecture, or have another shape.
    """
    revision = options.get("revision")
    pinned = {} if revision is None else {"revision": revision}
    if find_adapter_config_file(name_or_path, **pinned) is not None:
        return _load_adapters(name_or_path, pinned, options)
    model, found = AutoModelForCausalLM.from_pretrained(
        name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    check_loaded(found, name_or_path)
    return model


def _load_adapters(
    name_or_path: str, pinned: dict[str, str], options: dict[str, Any]
) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(
            f"{name_or_path!r} holds adapters, which need the peft package: "
            "pip install 'lightning-kd[lora]'"
        ) from error
    adapted = PeftConfig.from_pretrained(name_or_path, **pinned)
    base = adapted.base_model_name_or_path
    if base is None or (Path(name_or_path) / "config.json").exists():
        raise ValueError(
            f"{name_or_path!r} holds adapters but does not say of which other model; merge them into "
            "their model with peft's merge_and_unload and give the directory of the merged model"
        )
    model = load_checkpoint(base, **options | {"revision": adapted.revision})
    # Adapters are drawn at random before they are loaded.
    with torch.random.fork_rng(devices=[]), peft_as_it_is():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        model = PeftModel.from_pretrained(model, name_or_path, **pinned)
        # Loaded once more for its report, which the first time leaves out.
        found = model.load_adapter(name_or_path, "default", **pinned)
    report = {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys}
    check_loaded(report, name_or_path)
    if options.get("quantization_config") is not None:
        return model
    return model.merge_and_unload().requires_grad_(True)


def check_loaded(found: Mapping[str, Collection[Any]], name: str) -> None:
    """Refuse a checkpoint that does not fit its architecture.

    Args:
        found: What ``from_pretrained`` returns with ``output_loading_info=True``.
        name: The directory or hub name.

    Raises:
        ValueError: If weights are missing, are not part of the architecture, or have another shape.

    Example:
        >>> check_loaded({"missing_keys": {"b.weight"}, "unexpected_keys": {"a.weight"}}, "teacher")
        Traceback (most recent call last):
        ...
        ValueError: the checkpoint 'teacher' does not hold the weights of its config:
          1 missing, which would be random: b.weight
          1 not part of the architecture, which would be dropped: a.weight
        Correct its config.json, or give a checkpoint of the same architecture (one that you have \
loaded with transformers and saved again is)
    """
    shapes = [
        f"{key} (saved {tuple(saved)}, expected {tuple(expected)})"
        for key, saved, expected in sorted(found.get("mismatched_keys", ()))
    ]
    surplus = [key for key in found.get("unexpected_keys", ()) if not _NO_WEIGHTS.search(key)]
    lines = [
        f"  {len(keys)} {what}: {_some(keys)}"
        for keys, what in (
            (found.get("missing_keys", ()), "missing, which would be random"),
            (surplus, "not part of the architecture, which would be dropped"),
            (shapes, "of another shape, which would be random"),
        )
        if keys
    ]
    if lines:
        listed = "\n".join(lines)
        raise ValueError(
            f"the checkpoint {name!r} does not hold the weights of its config:\n{listed}\n"
            "Correct its config.json, or give a checkpoint of the same architecture (one that you have "
            "loaded with transformers and saved again is)"
        )


def _some(keys: Collection[str]) -> str:
    named = sorted(keys)[:_NAMED]
    return ", ".join(named) + (", ..." if len(keys) > _NAMED else "")
