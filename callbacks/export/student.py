"""A student as a Hugging Face directory: weights, tokenizer and generation config."""

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.generation.checkpoint_config import generation_config_of
from lightning_kd.models.adapters import has_adapters, merge_adapters
from lightning_kd.models.sharding import is_sharded
from lightning_kd.modules import DistillationModule
from lightning_kd.tokenization import end_of_sequence_ids


def write_student(
    module: DistillationModule, weights: dict[str, Any], directory: Path
) -> dict[str, Any]:
    """Save model, tokenizer and generation config under ``directory``.

    Returns:
        The special tokens of the generation config that were changed, with their former values.
    """
    model, tokenizer = module.student, module.tokenizer
    if has_adapters(model):
        # Merging changes the weights in place, and this model may be trained further; a sharded one
        # cannot be copied, but can be built again.
        if is_sharded(model):
            model = module.student_spec.build(tokenizer)
        else:
            model = copy.deepcopy(model).cpu()
        model.load_state_dict(weights)
        model = merge_adapters(model)
        weights = model.state_dict()
    config, changed = trained_config(model, tokenizer)
    # Saving validates it, and what is published is not always valid: it is written as it was.
    with generation_config_of(model, GenerationConfig()):
        model.save_pretrained(directory, state_dict=weights)
    config.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(directory)
    return changed


def trained_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the generation config of a trained model, and what is new in it.

    It is that of the checkpoint that the model comes from, with the special tokens that it was trained
    on.

    Args:
        model: Keeps its own.
        tokenizer: The one it was trained with.

    Returns:
        The config, and the former values of the special tokens that differ.
    """
    config = _own_config(model)
    ends = config.eos_token_id
    before = {*ends} if isinstance(ends, list) else {ends} - {None}
    trained: dict[str, Any] = {}
    if before != (now := end_of_sequence_ids(model, tokenizer)):
        trained["eos_token_id"] = sorted(now)
    for name in ("pad_token_id", "bos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None and value != getattr(config, name):
            trained[name] = value
    changed = {name: getattr(config, name) for name in trained}
    for name, value in trained.items():
        setattr(config, name, value)
    return config, changed


def _own_config(model: PreTrainedModel) -> GenerationConfig:
    """Return a copy of the generation config, without what transformers derives from the model's."""
    own = model.generation_config
    if own is None:
        return GenerationConfig()
    if not own._from_model_config:
        return copy.deepcopy(own)
    derived = GenerationConfig.from_model_config(model.config).to_dict()
    special = {"eos_token_id", "pad_token_id", "bos_token_id"}
    set_since = {n: v for n, v in own.to_dict().items() if n in special or derived.get(n) != v}
    return GenerationConfig(**set_since)
