"""Batched sampling from one causal language model, or from a mixture of several."""

from collections.abc import Collection, Sequence
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.collectives import any_process
from lightning_kd.generation.cache import leave_inference_mode
from lightning_kd.generation.completions import Completions, completion_mask, is_end
from lightning_kd.generation.decoder import Decoder, evaluating
from lightning_kd.generation.engine import Engine, Prompts
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.models.sharding import is_sharded

_IDLE_SHARE = 1 / 16
"""Ended rows are taken out of the batch when they are more than this share of it: more often costs
copies of the cache, less often forward passes for nobody."""

_DRAWN_AT_ONCE = 256
"""Random numbers of a row that are drawn together."""


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
    mixed = [model for model, _ in models]
    if len(mixed) > 1 and options.truncates:
        raise ValueError(
            f"teacher-mixed sampling with temperature {options.temperature}, top_k "
            f"{options.top_k} and top_p {options.top_p}: what one model cuts off, the other may "
            "still propose, and its importance weight would be 0 or unbounded. Sample with a "
            "temperature above 0, top_k 0 and top_p 1"
        )
    rows, longest = len(prompt_ids), options.max_new_tokens
    uniforms = _Uniforms(seeds, prompt_ids.device)
    # A column for each token that is generated: a limit that is never reached takes no memory.
    ids: list[Tensor] = []
    log_probs_of_first: list[Tensor] = []
    log_probs_of_mixture: list[Tensor] = []
    together = any(is_sharded(model) for model in mixed)
    # The whole weights of a shard are allocated once, and the backward pass would refuse them.
    mode = torch.no_grad() if together else torch.inference_mode()
    with evaluating(*mixed), mode:
        decoders = [Decoder(model, prompt_ids, prompt_mask) for model in mixed]
        active = torch.arange(rows, device=prompt_ids.device)
        ended = torch.zeros_like(active, dtype=torch.bool)
        for place in range(longest):
            of_first, of_mixture = _next_token(decoders, [w for _, w in models], options, width)
            tokens = _draw(of_mixture, uniforms.at(place)[active], options)
            going, chosen = ~ended, tokens[:, None]
            for columns, values, fill in (
                (ids, tokens, pad_id),
                (log_probs_of_first, of_first.gather(-1, chosen)[:, 0], 0),
                (log_probs_of_mixture, of_mixture.gather(-1, chosen)[:, 0], 0),
            ):
                column = values.new_full((rows,), fill)
                column[active[going]] = values[going]
                columns.append(column)
            ended = ended | is_end(tokens, eos_ids)
            idle = int(ended.sum())
            done = idle == len(ended)
            if together:
                done = not any_process(not done, prompt_ids.device)
            if done or place == longest - 1:
                break
            for decoder in decoders:
                decoder.append(tokens)
            worth_it = _IDLE_SHARE * len(ended) < idle < len(ended)
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
    mask = completion_mask(generated, eos_ids)
    ended_rows = (is_end(generated, eos_ids) & mask).any(-1)
    return Completions(generated, mask, log_probs, sampling_log_probs, ended_rows)


def _next_token(
    decoders: Sequence[Decoder],
    weights: Sequence[float],
    options: GenerationOptions,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the first model and of the mixture, ``(rows, V)`` each."""
    temperature = options.temperature or 1.0
    width = min([d.logits.shape[-1] for d in decoders] + ([] if width is None else [width]))
    each = [F.log_softmax(d.logits[:, :width] / temperature, -1) for d in decoders]
    if len(each) == 1:
        return each[0], each[0]
    weighted = [log_probs + log(w) for log_probs, w in zip(each, weights, strict=True)]
    return each[0], torch.stack(weighted).logsumexp(0)


def _draw(log_probs: Tensor, uniforms: Tensor, options: GenerationOptions) -> Tensor:
    """Return the most likely token, or the one at which the cumulative distribution passes a number."""
    if options.temperature == 0:
        return log_probs.argmax(-1)
    kept = _truncated(log_probs, options)
    # In float64: the steps of a float32 sum over a large vocabulary would swallow rare tokens.
    cumulative = kept.exp().double().cumsum(-1)
    height = uniforms * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, height[:, None], right=True)[:, 0]
    return tokens.clamp(max=log_probs.shape[-1] - 1)


def _truncated(log_probs: Tensor, options: GenerationOptions) -> Tensor:
    """Return log-probabilities, minus infinity where top-k and top-p exclude a token."""
    if 0 < options.top_k < log_probs.shape[-1]:
        least = log_probs.topk(options.top_k).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf).log_softmax(-1)
    if options.top_p < 1:
        ordered, order = log_probs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        beyond = torch.zeros_like(before, dtype=torch.bool)
        beyond.scatter_(-1, order, before >= options.top_p)
        log_probs = log_probs.masked_fill(beyond, -torch.inf)
    return log_probs


class _Uniforms:
    """Random numbers in [0, 1) for each row, from its own generator, drawn as needed."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._drawn = torch.empty(0)

    def at(self, place: int) -> Tensor:
        """Return the numbers of a position, ``(rows,)``; positions come in order."""
        if place % _DRAWN_AT_ONCE == 0:
            drawn = [
                torch.rand(_DRAWN_AT_ONCE, generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
            self._drawn = torch.stack(drawn).to(self._device)
        return self._drawn[:, place % _DRAWN_AT_ONCE]
