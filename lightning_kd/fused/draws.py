"""Tokens drawn at random from full distributions, a chunk of positions at a time."""

import torch
from torch import Tensor

from lightning_kd.divergences.log_space import expectation
from lightning_kd.fused.answers import FullDistribution
from lightning_kd.fused.sparse_answers import SampledTokens, TopK
from lightning_kd.fused.summaries import distributions_of


@torch.no_grad()
def sampled_of(
    answer: FullDistribution,
    draws: int,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    """Tokens drawn independently from the whole distribution, each of weight 1 over ``draws``.

    Args:
        answer: The distributions.
        draws: Tokens at each position.
        generator: Of the draws; they do not depend on how positions are cut into chunks.

    Raises:
        ValueError: If ``draws`` is not positive.

    Example:
        >>> from lightning_kd.fused import MaterializedLogits
        >>> logits = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
        >>> answer = FullDistribution((MaterializedLogits(logits),))
        >>> drawn = sampled_of(answer, 4, torch.Generator().manual_seed(0))
        >>> drawn.token_ids, drawn.weights
        (tensor([[3, 1, 0, 2]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    uniforms = _uniforms(answer, draws, generator)
    entropies = _empty(answer)
    ids = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    for rows, distribution in distributions_of(answer):
        whole = distribution.log_probs(1.0)
        ids[rows] = _drawn(whole, uniforms[rows])
        entropies[rows] = -expectation(whole, whole)
    weights = entropies.new_full(ids.shape, 1 / draws)
    return SampledTokens(ids, weights, entropies)


@torch.no_grad()
def tail_draws_of(
    answer: FullDistribution,
    top: TopK,
    draws: int,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    r"""The k named tokens, and tokens drawn from the tail.

    A named token weighs :math:`p(v)`, and each of m draws :math:`P_{tail} / m`: unbiased as draws from
    the whole distribution are, with the variance of the tail alone.

    Args:
        answer: The distributions.
        top: Of the same positions; without a tail there is nothing to draw.
        draws: m.
        generator: Of the draws; they do not depend on how positions are cut into chunks.

    Returns:
        ``k + draws`` tokens at each position, the named ones first.

    Raises:
        ValueError: If ``draws`` is not positive, or all tokens are named.
    """
    width = answer.logits[0].shape[1]
    if top.token_ids.shape[1] >= width:
        raise ValueError(f"all {width} tokens are named: there is no tail to draw from")
    uniforms = _uniforms(answer, draws, generator)
    entropies = _empty(answer)
    drawn = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    for rows, distribution in distributions_of(answer):
        whole = distribution.log_probs(1.0)
        drawn[rows] = _drawn(whole.scatter(-1, top.token_ids[rows], -torch.inf), uniforms[rows])
        entropies[rows] = -expectation(whole, whole)
    events = top.at(1.0, width).exp().to(entropies.dtype)
    shares = (events[:, -1:] / draws).expand(-1, draws)
    ids = torch.cat([top.token_ids, drawn], -1)
    return SampledTokens(ids, torch.cat([events[:, :-1], shares], -1), entropies)


def _uniforms(answer: FullDistribution, draws: int, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1), ``(N, draws)``, float64."""
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be positive")
    shape, device = (answer.logits[0].shape[0], draws), answer.logits[0].device
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def _empty(answer: FullDistribution) -> Tensor:
    first = answer.logits[0]
    return torch.empty(first.shape[0], dtype=first.dtype, device=first.device)


def _drawn(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the distribution function, of probabilities that need not add up to 1.

    Float64: in float32 the sum over a large vocabulary moves the rarest tokens.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    places = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return places.clamp_max(log_probs.shape[1] - 1)
