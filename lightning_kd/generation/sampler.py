"""Batched sampling from one causal language model, or from a mixture of several."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.collectives import any_process
from lightning_kd.generation.cache import leave_inference_mode
from lightning_kd.generation.completions import Completions, is_end
from lightning_kd.generation.decoder import Decoder, evaluating, tokens_between_looks
from lightning_kd.generation.drawing import check_mixture, draw, next_token
from lightning_kd.generation.engine import Engine, Prompts
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.tall_head import tall_heads
from lightning_kd.generation.uniforms import Uniforms
from lightning_kd.models.sharding import is_sharded

IDLE_SHARE = 1 / 16
"""Ended rows are taken out of the batch when they are more than this share of it: more often costs
copies of the cache, less often forward passes for nobody."""


class CachedSampler(Engine):
    """The library's own batched sampler, with a key-value cache.

    A row's completion depends on its prompt and seed alone, never on the batch it is in.
    """

    gives_log_probs = True
    supports_mixtures = True
    seeds_rows = True

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        """Generate with one model or a mixture; see :func:`sample`."""
        return sample(
            models,
            prompts.ids,
            prompts.mask,
            options,
            eos_ids=prompts.eos_ids,
            pad_id=prompts.pad_id,
            seeds=seeds,
            width=prompts.width,
        )


def sample(
    models: Sequence[tuple[PreTrainedModel, float]],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seeds: Sequence[int],
    width: int | None = None,
) -> Completions:
    r"""Complete prompts, each row from its own random numbers.

    With several models, a token is drawn from :math:`\tilde p = \sum_k w_k p_k`, each at the
    sampling temperature and each with its own cache (MiniLLM, Eq. 4). Where a model is in shards,
    all processes generate together, and each goes on until the last one has ended.

    Args:
        models: Models and their weights in the mixture. Log-probabilities are those of the first.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        eos_ids: Tokens that end a completion.
        pad_id: Fills up rows that have ended.
        seeds: One for each row. A completion depends on its prompt and its seed, not on its batch.
        width: Tokens from here on are never drawn. Defaults to the narrowest model's vocabulary.

    Raises:
        ValueError: If a mixture is to be sampled greedily or from part of its vocabulary.
    """
    check_mixture(models, options)
    mixed, weights = [model for model, _ in models], [weight for _, weight in models]
    rows, longest, device = len(prompt_ids), options.max_new_tokens, prompt_ids.device
    uniforms, between = Uniforms(seeds, device), tokens_between_looks(device)
    # A column for each token that is generated: a limit that is never reached takes no memory.
    ids: list[Tensor] = []
    log_probs_of_first: list[Tensor] = []
    log_probs_of_mixture: list[Tensor] = []
    together = any(is_sharded(model) for model in mixed)
    # The whole weights of a shard are allocated once, and the backward pass would refuse them.
    mode = torch.no_grad() if together else torch.inference_mode()
    with evaluating(*mixed), mode, tall_heads(*mixed):
        decoders = [Decoder(model, prompt_ids, prompt_mask) for model in mixed]
        active, ends = (
            torch.arange(rows, device=device),
            torch.tensor(sorted(eos_ids), device=device),
        )
        ended = torch.zeros_like(active, dtype=torch.bool)
        for place in range(longest):
            of_first, of_mixture = next_token(decoders, weights, options, width)
            tokens = draw(of_mixture, uniforms.at(place)[active], options)
            chosen = tokens[:, None]
            for columns, values, fill in (
                (ids, tokens, pad_id),
                (log_probs_of_first, of_first.gather(-1, chosen)[:, 0], 0),
                (log_probs_of_mixture, of_mixture.gather(-1, chosen)[:, 0], 0),
            ):
                column = values.new_full((rows,), fill)
                column[active] = values.masked_fill(ended, fill)
                columns.append(column)
            ended = ended | is_end(tokens, ends)
            looks = (place + 1) % between == 0
            idle = int(ended.sum()) if looks else 0
            done = looks and idle == len(ended)
            if looks and together:
                done = not any_process(not done, device)
            if done or place == longest - 1:
                break
            for decoder in decoders:
                decoder.append(tokens)
            worth_it = IDLE_SHARE * len(ended) < idle < len(ended)
            if worth_it and all(d.can_drop_rows for d in decoders):
                kept = (~ended).nonzero()[:, 0]
                for decoder in decoders:
                    decoder.keep(kept)
                    decoder.logits = decoder.logits[kept]
                active, ended = active[kept], ended[kept]
    for model in mixed:
        leave_inference_mode(model)
    # Outside of inference mode, where stacking makes ordinary tensors that can be trained on.
    columns_of_rows = (ids, log_probs_of_first, log_probs_of_mixture)
    generated, log_probs, sampling_log_probs = (torch.stack(c, 1) for c in columns_of_rows)
    completions = Completions.of_columns(generated, log_probs, sampling_log_probs, eos_ids)
    # In shards, the columns of other processes too; else none that came before a look at the ends.
    return completions if together else completions.trimmed()
