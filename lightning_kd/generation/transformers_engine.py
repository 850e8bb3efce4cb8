"""Completions by Hugging Face ``generate``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightning_kd.generation.checkpoint_config import generation_config_of
from lightning_kd.generation.completions import Completions, completion_mask, is_end
from lightning_kd.generation.decoder import evaluating
from lightning_kd.generation.engine import Engine
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.prompts import Prompts, check_seeds
from lightning_kd.generation.token_positions import (
    check_padded_scores,
    check_padding,
    check_steps,
)
from lightning_kd.models.sharding import is_sharded
from lightning_kd.models.vocabulary import vocabulary_size
from lightning_kd.seeding import derive_seed


class TransformersEngine(Engine):
    """Engine that calls ``model.generate`` of transformers.

    For beam search and for models without a key-value cache. ``generate`` draws all rows from one
    generator, so a row's completion depends on the rows beside it. Log-probabilities come from a
    forward pass over the completions; greedily and by beam search they are those at temperature 1.

    Raises:
        ValueError: Before the first step, if the model gives other scores when it reads token by token;
            when it generates, if prompts are padded and it takes padding for tokens.
    """

    gives_log_probs = True
    supports_beam_search = True

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        """Refuse models that transformers does not complete as what they are in a training step."""
        for model in models:
            check_steps(model)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Generate with one model; all seeds together decide the samples."""
        ((model, _),) = models
        check_seeds(seeds, len(prompts.ids))
        check_steps(model)
        prompt_ids, prompt_mask, width = prompts.ids, prompts.mask, prompts.width
        config = generation_config(model, prompts, options)
        devices = [prompt_ids.device] if prompt_ids.is_cuda else []
        with (
            evaluating(model),
            generation_config_of(model, config),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(derive_seed(*seeds))
            if not bool(prompt_mask.all()):
                _check_padded(model, prompt_ids, prompt_mask)
            output = model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                generation_config=config,
                # Not left to transformers: processes that end earlier must go on with the others.
                synced_gpus=is_sharded(model),
            )
            ids = output[:, prompt_ids.shape[1] :]
            mask = completion_mask(ids, prompts.eos_ids)
            attention_mask = torch.cat([prompt_mask, mask.long()], -1)
            logits = _logits(model, output, attention_mask)
        scores = logits[:, prompt_ids.shape[1] - 1 : -1, :width].float()
        log_probs = (scores / (options.temperature or 1.0)).log_softmax(-1)
        chosen = log_probs.gather(-1, ids[:, :, None])[:, :, 0] * mask
        ended = (is_end(ids, prompts.eos_ids) & mask).any(-1)
        return Completions(ids, mask, chosen, chosen, ended)


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return scores of a forward pass over rows that are padded on the left, ``(B, T, V)``."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits


def _check_padded(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
    """Refuse padded prompts that would be completed as others.

    Raises:
        ValueError: If the model takes padding for tokens, or gives NaN for it.
    """
    check_padding(model)
    if model.dtype == torch.float64:
        check_padded_scores(model, _logits(model, ids, mask)[:, -1])


def generation_config(
    model: PreTrainedModel, prompts: Prompts, options: GenerationOptions
) -> GenerationConfig:
    """Return options of generation as transformers has them.

    Args:
        model: Has tokens that may have to be left out.
        prompts: Know which, and which ones are special.
        options: Length and sampling.
    """
    beyond = [] if prompts.width is None else list(range(prompts.width, vocabulary_size(model)))
    sampling = (
        {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        if options.temperature > 0
        else {}
    )
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        num_beams=options.num_beams,
        eos_token_id=sorted(prompts.eos_ids),
        pad_token_id=prompts.pad_id,
        suppress_tokens=beyond or None,
        **sampling,
    )
