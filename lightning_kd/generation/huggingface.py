"""Completions through Hugging Face ``generate``."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_kd.generation.checkpoint_config import generation_config_of
from lightning_kd.generation.completions import Completions, completion_mask, is_end
from lightning_kd.generation.decoder import evaluating
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.models.sharding import is_sharded
from lightning_kd.models.vocabulary import vocabulary_size
from lightning_kd.seeding import derive_seed


@torch.no_grad()
def generate_with_transformers(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seeds: Sequence[int],
    width: int | None = None,
) -> Completions:
    """Complete prompts with ``model.generate``; the global random state stays as it was.

    ``generate`` draws all rows from one generator, so a row's text depends on the rows beside it.
    Log-probabilities come from a forward pass over what was written; greedily and by beam search they
    are those at temperature 1.

    Args:
        model: Any causal language model of transformers.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        eos_ids: Tokens that end a completion.
        pad_id: Fills up rows that have ended.
        seeds: One for each row; together they decide the samples.
        width: Tokens from here on are never drawn.
    """
    beyond = [] if width is None else list(range(width, vocabulary_size(model)))
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
        pad_token_id=pad_id,
        suppress_tokens=beyond or None,
        **sampling,
    )
    devices = [prompt_ids.device] if prompt_ids.is_cuda else []
    with (
        evaluating(model),
        generation_config_of(model, config),
        torch.random.fork_rng(devices=devices),
    ):
        torch.manual_seed(derive_seed(*seeds))
        output = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=config,
            # Not left to transformers: processes that end earlier must go on with the others.
            synced_gpus=is_sharded(model),
        )
        ids = output[:, prompt_ids.shape[1] :]
        mask = completion_mask(ids, eos_ids)
        attention_mask = torch.cat([prompt_mask, mask.long()], -1)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=output, attention_mask=attention_mask, position_ids=positions)
    scores = logits.logits[:, prompt_ids.shape[1] - 1 : -1, :width].float()
    log_probs = (scores / (options.temperature or 1.0)).log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, :, None])[:, :, 0] * mask
    ended = (is_end(ids, eos_ids) & mask).any(-1)
    return Completions(ids, mask, chosen, chosen, ended)
