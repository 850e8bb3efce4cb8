"""The distribution of the next token, and tokens that are drawn from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.generation.decoder import Decoder
from lightning_kd.generation.options import GenerationOptions


def check_mixture(
    models: Sequence[tuple[PreTrainedModel, float]], options: GenerationOptions
) -> None:
    """Refuse a mixture that is sampled greedily or from part of its vocabulary.

    Raises:
        ValueError: If it is.
    """
    if len(models) > 1 and options.truncates:
        raise ValueError(
            f"teacher-mixed sampling with temperature {options.temperature}, top_k "
            f"{options.top_k} and top_p {options.top_p}: what one model cuts off, the other may "
            "still propose, and its importance weight would be 0 or unbounded. Sample with a "
            "temperature above 0, top_k 0 and top_p 1"
        )


class Mix(Protocol):
    """Makes one distribution of those of several models."""

    def __call__(self, each: Sequence[Tensor]) -> Tensor:
        """Return log-probabilities, ``(rows, V)``, of those of each model."""
        ...


@dataclass(frozen=True)
class Mixture:
    r"""The weighted sum :math:`\sum_k w_k p_k`."""

    weights: tuple[float, ...]

    def __call__(self, each: Sequence[Tensor]) -> Tensor:
        """Add them up; one alone stays as it is."""
        if len(each) == 1:
            return each[0]
        weighted = [log_probs + log(w) for log_probs, w in zip(each, self.weights, strict=True)]
        return torch.stack(weighted).logsumexp(0)


@dataclass(frozen=True)
class Replacement:
    r"""The first model's token, replaced by the second where that ranks it below its first ``k``.

    With :math:`q` the first, :math:`p` the second and :math:`S` its ``k`` most likely tokens, a token
    outside :math:`S` is drawn again from :math:`p` over :math:`S`: together

    .. math:: m(v) = q(v) + \Bigl(1 - \sum_{u \in S} q(u)\Bigr) \frac{p(v)}{\sum_{u \in S} p(u)},
        \quad v \in S

    Example:
        >>> own, teacher = torch.tensor([[[0.5, 0.25, 0.25]], [[0.125, 0.5, 0.375]]]).log()
        >>> Replacement(2)([own, teacher]).exp()
        tensor([[0.0000, 0.5357, 0.4643]])
    """

    k: int

    def __call__(self, each: Sequence[Tensor]) -> Tensor:
        """Leave the first as it is where ``k`` is the whole vocabulary."""
        own, other = each
        if self.k >= own.shape[-1]:
            return own
        best = other.topk(self.k, -1)
        outside = own.scatter(-1, best.indices, -torch.inf).logsumexp(-1, keepdim=True)
        drawn_again = outside + best.values.log_softmax(-1)
        kept = torch.logaddexp(own.gather(-1, best.indices), drawn_again)
        return torch.full_like(own, -torch.inf).scatter(-1, best.indices, kept)


def next_token(
    decoders: Sequence[Decoder], mix: Mix, options: GenerationOptions, width: int | None
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the first model and of the mix, ``(rows, V)`` each."""
    temperature = options.temperature or 1.0
    width = min([d.logits.shape[-1] for d in decoders] + ([] if width is None else [width]))
    each = [F.log_softmax(d.logits[:, :width] / temperature, -1) for d in decoders]
    return each[0], mix(each)


def draw_next(
    decoders: Sequence[Decoder],
    mix: Mix,
    options: GenerationOptions,
    width: int | None,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next token of each row.

    Args:
        decoders: One of each model.
        mix: What is drawn from.
        options: Sampling.
        width: Tokens from here on are never drawn.
        uniforms: A number in [0, 1) for each row, ``(rows,)``.

    Returns:
        Tokens, and their log-probabilities under the first model and under the mix, ``(rows,)``
        each.
    """
    of_first, of_mixture = next_token(decoders, mix, options, width)
    tokens = draw(of_mixture, uniforms, options)
    first, mixture = (v.gather(-1, tokens[:, None])[:, 0] for v in (of_first, of_mixture))
    return tokens, first, mixture


def draw(log_probs: Tensor, uniforms: Tensor, options: GenerationOptions) -> Tensor:
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
