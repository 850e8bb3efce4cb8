"""One way to ask for completions, whoever writes them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.generation.checkpoint_config import say_what_is_ignored
from lightning_kd.generation.completions import Completions
from lightning_kd.generation.huggingface import generate_with_transformers
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.sampler import sample
from lightning_kd.models.positions import check_length
from lightning_kd.tokenization import end_of_sequence_ids, padding_id


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    *,
    seeds: Sequence[int],
    mixed_with: tuple[PreTrainedModel, float] | None = None,
    width: int | None = None,
) -> Completions:
    """Complete a batch of prompts; the global random state and the model's mode stay as they were.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Gives the EOS; those of the model's generation config end a completion too.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length, sampling and engine.
        seeds: One for each row.
        mixed_with: Another model and its share in the distribution that is sampled from.
        width: Tokens from here on are never written: those that a teacher does not know.

    Raises:
        ValueError: If a mixture is asked for with options that have none, or prompts and completions
            could be longer than the models can read.
    """
    writers = [model] if mixed_with is None else [model, mixed_with[0]]
    longest = int(prompt_mask.sum(-1).max()) + options.max_new_tokens
    for writer in writers:
        check_length({type(writer).__name__: writer}, longest, "prompts and max_new_tokens")
        say_what_is_ignored(writer)
    engine = options.engine
    if engine == "auto":
        engine = "transformers" if options.num_beams > 1 else "cached"
    if engine == "transformers" and mixed_with is not None:
        raise ValueError("a mixture of two models needs engine: cached and num_beams: 1")
    ends: dict[str, Any] = {
        "eos_ids": end_of_sequence_ids(model, tokenizer),
        "pad_id": padding_id(tokenizer),
        "seeds": seeds,
        "width": width,
    }
    if engine == "transformers":
        return generate_with_transformers(model, prompt_ids, prompt_mask, options, **ends)
    if mixed_with is None:
        return sample([(model, 1.0)], prompt_ids, prompt_mask, options, **ends)
    mixture = [(model, 1 - mixed_with[1]), mixed_with]
    return sample(mixture, prompt_ids, prompt_mask, options, **ends)
