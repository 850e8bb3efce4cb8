"""The generation config that comes with a checkpoint: what is not taken from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_info
from transformers import GenerationConfig, PreTrainedModel

_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "diversity_penalty": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
}
"""Values with which a field changes nothing; None changes nothing anywhere."""

_OF_NO_TEXT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("max_length", "max_new_tokens", "do_sample", "early_stopping"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "compile_config", "disable_compile", "low_memory"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "is_assistant", "prefill_chunk_size"),
    *("transformers_version", "_from_model_config", "generation_kwargs"),
}
"""Fields that have no part in what is written, or stand for options of our own."""

_said: WeakSet[PreTrainedModel] = WeakSet()


def ignored_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model's generation config asks of the text it writes, which is not done.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8))
        >>> model.generation_config.update(repetition_penalty=1.5, top_p=1.0)
        {}
        >>> ignored_fields(model)
        {'repetition_penalty': 1.5}
    """
    config = model.generation_config
    fields = {} if config is None else config.to_diff_dict()
    return {
        name: value
        for name, value in fields.items()
        if name not in _OF_NO_TEXT and value is not None and value != _NEUTRAL.get(name, False)
    }


def say_what_is_ignored(model: PreTrainedModel) -> None:
    """Say, once for each model, which fields of its generation config are not used."""
    if model in _said:
        return
    _said.add(model)
    ignored = ignored_fields(model)
    if ignored:
        listed = ", ".join(f"{name} {value!r:.40}" for name, value in ignored.items())
        rank_zero_info(
            f"the generation config of {type(model).__name__} is not used, except its EOS: "
            f"completions are written by the options of generation alone (ignored: {listed})"
        )


@contextmanager
def generation_config_of(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Give a model a generation config for a while.

    ``generate`` fills every field that its argument leaves open from the model's own config, so the
    argument alone does not decide.

    Args:
        model: The model, or adapters of peft around it.
        config: What it has meanwhile.
    """
    whole: Any = model
    models = [model, whole.get_base_model()] if hasattr(whole, "get_base_model") else [model]
    before = [(each, vars(each).get("generation_config", each)) for each in models]
    try:
        for each in models:
            each.generation_config = config
        yield
    finally:
        for each, own in before:
            if own is each:  # it had none of its own, but its inner model's
                del each.generation_config
            else:
                each.generation_config = own
