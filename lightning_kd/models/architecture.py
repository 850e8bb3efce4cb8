"""Architecture of a student as plain data, and a model of it without its weights."""

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lightning_kd.models.adapters import has_adapters, without_adapters
from lightning_kd.models.student_spec import StudentSpec

_CONFIG, _GENERATION, _CLASS, _ADAPTED = "config", "generation", "class", "adapted"


def architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model is built from, weights excepted: of one with adapters, of what they adapt."""
    core = without_adapters(model)
    generation = core.generation_config
    return {
        _CONFIG: json.loads(core.config.to_json_string(use_diff=False)),
        _GENERATION: None if generation is None else json.loads(generation.to_json_string()),
        _CLASS: type(core).__name__,
        _ADAPTED: has_adapters(model),
    }


def model_of(
    architecture: dict[str, Any], spec: StudentSpec | None, dtype: torch.dtype
) -> PreTrainedModel:
    """Return a model of an architecture, whose weights a checkpoint is to fill.

    Args:
        architecture: Of the saved student.
        spec: How the saved student was made; None if it was handed over as an object.
        dtype: Type of its weights.

    Raises:
        ValueError: If no such model can be built: of a class of one's own, or with adapters that no
            ``lora`` describes.
    """
    config = dict(architecture[_CONFIG])
    made: PreTrainedModel | None = None
    reason: Exception | None = None
    kernel = None if spec is None else spec.attn_implementation
    try:
        built = AutoConfig.for_model(config.pop("model_type", ""), **config)
        with torch.random.fork_rng(devices=[]):
            made = AutoModelForCausalLM.from_config(
                built,
                dtype=dtype,
                attn_implementation=kernel,
            )
    except (ValueError, KeyError, TypeError) as error:
        reason = error  # a class of one's own, which is named below
    described = spec is not None and spec.lora is not None
    if type(made).__name__ != architecture[_CLASS] or architecture[_ADAPTED] != described:
        raise ValueError(
            f"the student of the checkpoint is a {architecture[_CLASS]}"
            + (" with adapters" if architecture[_ADAPTED] else "")
            + " that was handed over as an object, which a checkpoint does not hold: give "
            "load_from_checkpoint(..., student=...), built as it was"
        ) from reason
    assert made is not None
    if architecture[_GENERATION] is not None:
        made.generation_config = GenerationConfig.from_dict(architecture[_GENERATION])
    return made if spec is None else spec.prepared(made)
