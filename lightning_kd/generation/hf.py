"""Completions through Hugging Face ``generate``."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.generation.completions import Completions, completion_mask


@dataclass(frozen=True)
class GenerationOptions:
    """How completions are written.

    Attributes:
        max_new_tokens: Longest completion, its EOS included.
        temperature: 0 takes the most likely token; above 0, samples at this temperature.
        top_k: When sampling, keep only the ``top_k`` most likely tokens; 0 keeps all.
        top_p: When sampling, keep the smallest set of tokens with this probability; 1 keeps all.
        num_beams: Width of beam search; 1 is none. Kim and Rush (2016) use 5 for the texts of
            sequence-level distillation.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, ok, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (keep all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {expected}")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    *,
    seed: int,
) -> Completions:
    """Complete a batch of prompts; the global random state and the model's mode stay as they were.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Gives the EOS; those of the model's generation config end a completion too.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        seed: Of the samples.

    Returns:
        The completions, at most ``options.max_new_tokens`` long.
    """
    eos_ids = end_of_sequence_ids(model, tokenizer)
    sampling = (
        {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        if options.temperature > 0
        else {}
    )
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        num_beams=options.num_beams,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.eos_token_id if (pad := tokenizer.pad_token_id) is None else pad,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )
    was_training = model.training
    model.eval()
    devices = [prompt_ids.device] if prompt_ids.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=config
        )
    model.train(was_training)
    ids = output[:, prompt_ids.shape[1] :]
    return Completions(ids, completion_mask(ids, eos_ids))


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All ids that end a completion: the tokenizer's and those of the model's generation config."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ids = of_model if isinstance(of_model, list) else [of_model]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}
