"""Models without memory for their weights: their architecture, on the meta device."""

from contextlib import suppress

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from lightning_kd.models.adapters import check_without_adapters
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.positions import allow_positions
from lightning_kd.models.student_spec import StudentSpec
from lightning_kd.tokenization import check_path


def skeleton(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, role: str) -> PreTrainedModel:
    """Build the model of a spec on the meta device: all of it but the numbers in its weights.

    Nothing is downloaded but configurations. A model that was handed over is returned as it is. LoRA
    of a student is in place; a quantization is not, for weights of it are made from those that are
    loaded.

    Args:
        spec: The model.
        tokenizer: Gives vocabulary size and special ids to a configuration without them.
        role: For messages.

    Raises:
        ValueError: If there is no such model, or its configuration is invalid.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> spec = ModelSpec(config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1})
        >>> model = skeleton(spec, arithmetic_tokenizer(), "student")
        >>> model.device.type, model.config.vocab_size
        ('meta', 14)
    """
    lora = spec.lora if isinstance(spec, StudentSpec) else None
    if spec.is_given:
        model = spec.load(tokenizer, role)
        if lora is None:
            return model
        check_without_adapters(model)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if spec.is_given:  # adapters go into a copy
            model = type(model)(model.config).to(model.dtype)
        elif spec.name_or_path is None:
            model = spec.load(tokenizer, role)
        else:
            model = _of_checkpoint(spec, spec.name_or_path)
        if spec.max_positions is not None:
            allow_positions(model, spec.max_positions, role)
        return model if lora is None else lora.adapt(model)


def _of_checkpoint(spec: ModelSpec, name: str) -> PreTrainedModel:
    check_path(name, "model")
    pinned = {} if spec.revision is None else {"revision": spec.revision}
    try:
        if find_adapter_config_file(name, **pinned) is not None:
            from peft import PeftConfig

            name = PeftConfig.from_pretrained(name, **pinned).base_model_name_or_path
            pinned = {}
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **pinned)
        dtype = (
            getattr(config, "dtype", None) if spec.dtype == "auto" else getattr(torch, spec.dtype)
        )
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, attn_implementation=spec.attn_implementation
        )
    except (OSError, ValueError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise ValueError(f"cannot load the model {name!r}: {error}") from error
    with suppress(OSError):  # where it has none, that of its configuration stays
        model.generation_config = GenerationConfig.from_pretrained(name, **pinned)
    return model
