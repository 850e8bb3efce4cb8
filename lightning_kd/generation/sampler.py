"""Batched sampling from one causal language model, or from a mixture of several."""

from collections.abc import Collection, Sequence
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.collectives import any_process
from lightning_kd.generation.cache import ordinary_buffers
from lightning_kd.generation.completions import Completions, completion_mask, is_end
from lightning_kd.generation.decoder import evaluating, tokens_between_looks
from lightning_kd.generation.decoding import CacheKind, can_be_static, decoding_of
from lightning_kd.generation.drawing import Mix, Mixture, check_mixture
from lightning_kd.generation.engine import Engine
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.packed_linears import packed_layers
from lightning_kd.generation.prompts import Prompts, check_seeds
from lightning_kd.generation.recording import Tensors
from lightning_kd.generation.token_positions import check_cache
from lightning_kd.generation.uniforms import Uniforms
from lightning_kd.models.rotary import within_own_length
from lightning_kd.models.sharding import is_sharded
from lightning_kd.option_checks import check_choice


class CachedSampler(Engine):
    """The library's own batched sampler, with a key-value cache.

    A row's completion depends on its prompt and seed alone, never on the batch it is in (but of
    rotary embeddings that follow the length, it is that of the longest row).

    With a ``static`` cache, keys and values stay where they are, and on a CUDA device a step, from
    reading a token to drawing the next one, is recorded once as a graph and repeated: its hundreds of
    kernels are then launched at once. A step is recorded anew, which costs about two steps, when the
    cache grows by half (at least 64 tokens) and when half of the rows have ended and leave. A layer
    with a sliding window keeps all tokens. The graphs and the cache are released when the completions
    are done, so that training has their memory, and weights may be anywhere else the next time. Not
    measured on a GPU.

    Args:
        cache: ``dynamic`` appends to the cache kernel by kernel; ``static`` is as above; ``auto`` is
            ``static`` on a CUDA device where the models allow it (not in shards or on several devices,
            with keys and values alone, without flash attention), and else ``dynamic``. The text is the
            same, up to round-off.

    Raises:
        ValueError: If there is no such ``cache``; before the first step, if a model has no key-value
            cache, or with ``static`` does not allow it; when it generates, if prompts are padded and a
            model has no ``position_ids`` and counts the padding.
    """

    gives_log_probs = True
    supports_mixtures = True
    seeds_rows = True
    may_change_on_resume = frozenset({"cache"})

    def __init__(self, cache: CacheKind = "auto") -> None:
        check_choice("cache", cache, get_args(CacheKind))
        self.cache = cache

    @property
    def mix(self) -> Mix | None:
        """What makes one distribution of those of several models; None for their mixture."""
        return None

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        """Refuse models without a key-value cache, and obstacles to a static one that is asked for."""
        for model in models:
            check_cache(model)
        if self.cache == "static":
            can_be_static(models, self.cache)

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
            cache=self.cache,
            mix=self.mix,
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
    cache: CacheKind = "auto",
    mix: Mix | None = None,
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
        cache: Kind of key-value cache; see :class:`CachedSampler`.
        mix: Makes one distribution of theirs, in the place of the mixture.

    Raises:
        ValueError: If a mixture is to be sampled greedily or from part of its vocabulary, there is not
            one seed for each row, a static cache is asked for and a model does not allow it, or
            prompts are padded and a model counts the padding.
    """
    check_mixture(models, options)
    check_seeds(seeds, len(prompt_ids))
    mixed = [model for model, _ in models]
    rows, longest, device = len(prompt_ids), options.max_new_tokens, prompt_ids.device
    uniforms, between = Uniforms(seeds, device), tokens_between_looks(device)
    together = any(is_sharded(model) for model in mixed)
    # The whole weights of a shard are allocated once, and the backward pass would refuse them.
    mode = torch.no_grad() if together else torch.inference_mode()
    own_length = within_own_length(mixed, int(prompt_mask.sum(-1).max()) + longest)
    with ordinary_buffers(mixed), evaluating(*mixed), own_length, mode, packed_layers(*mixed):
        mix = mix or Mixture(tuple(weight for _, weight in models))
        decoding = decoding_of(mixed, mix, prompt_ids, prompt_mask, options, width, cache)
        active, ends = (
            torch.arange(rows, device=device),
            torch.tensor(sorted(eos_ids), device=device),
        )
        ended = torch.zeros_like(active, dtype=torch.bool)
        # Of each batch of rows, what is drawn: a limit that is never reached takes no memory.
        batches: list[tuple[Tensor, list[Tensors]]] = [(active, [])]
        for place in range(longest):
            drawn = decoding.draw(uniforms.at(place)[active])
            batches[-1][1].append(drawn)
            tokens = drawn[0]
            ended = ended | is_end(tokens, ends)
            looks = (place + 1) % between == 0
            idle = int(ended.sum()) if looks else 0
            done = looks and idle == len(ended)
            if looks and together:
                done = not any_process(not done, device)
            if done or place == longest - 1:
                break
            decoding.append(tokens)
            if decoding.idle_share * len(ended) < idle < len(ended) and decoding.can_drop_rows:
                kept = (~ended).nonzero()[:, 0]
                decoding.keep(kept)
                active, ended = active[kept], ended[kept]
                batches.append((active, []))
    # Outside of inference mode, where stacking makes ordinary tensors that can be trained on.
    completions = _laid_out(batches, rows, eos_ids=eos_ids, pad_id=pad_id)
    # In shards, the columns of other processes too; else none that came before a look at the ends.
    return completions if together else completions.trimmed()


def _laid_out(
    batches: Sequence[tuple[Tensor, list[Tensors]]],
    rows: int,
    *,
    eos_ids: Collection[int],
    pad_id: int,
) -> Completions:
    """Return completions of what batches of fewer and fewer rows have drawn, padded behind their ends.

    Args:
        batches: Their rows, and of each token what :func:`draw_next` has returned.
        rows: Of the first batch.
        eos_ids: Tokens that end a completion.
        pad_id: Fills up rows that have ended.
    """

    def columns(place: int, fill: int) -> Tensor:
        parts = []
        for active, drawn in batches:
            values = torch.stack([of_token[place] for of_token in drawn], 1)
            part = values.new_full((rows, len(drawn)), fill)
            part[active] = values
            parts.append(part)
        return torch.cat(parts, 1)

    ids = columns(0, pad_id)
    mask = completion_mask(ids, eos_ids)
    ids = ids.masked_fill(~mask, pad_id)
    log_probs, sampling_log_probs = (columns(n, 0).masked_fill(~mask, 0) for n in (1, 2))
    return Completions.of_columns(ids, log_probs, sampling_log_probs, eos_ids)
