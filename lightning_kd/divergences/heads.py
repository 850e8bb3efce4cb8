"""The head of a distribution: its most likely tokens, found without sorting all."""

import torch
from torch import Tensor

_FEW = 64
"""Tokens that are ranked first; the head of a language model's distribution rarely has more."""

_BUCKETS, _PER_NAT = 4096, 64
"""Buckets of log-probabilities, each 1/64 nat wide; the last holds all that is less likely."""


def head_of(log_probs: Tensor, mu: float) -> Tensor:
    """Return which tokens are in the head, the longest sorted prefix of probability ``mu`` or less.

    In order of their probability, and of their ids where that is equal. The most likely token always
    is in the head.

    Args:
        log_probs: ``(..., V)``.
        mu: Largest probability of the head.

    Returns:
        A mask, ``(..., V)``.

    Example:
        >>> head_of(torch.tensor([0.25, 0.4, 0.25, 0.1]).log(), 0.7)
        tensor([ True,  True, False, False])
    """
    mask: Tensor = _head_of(log_probs, mu)
    return mask


# An operator, which a compiler takes as it stands: what it does depends on the values.
@torch.library.custom_op("lightning_kd::head_of", mutates_args=())
def _head_of(log_probs: Tensor, mu: float) -> Tensor:
    rows = log_probs.reshape(-1, log_probs.shape[-1])
    best = rows.topk(min(_FEW, rows.shape[1]), -1).values
    last, ties, passed = _first_beyond(best, 0.0, mu)
    if best.shape[1] < rows.shape[1] and not bool(passed.all()):
        last[~passed], ties[~passed] = _in_a_large_head(rows[~passed], mu)
    ties = ties.where(last < best[:, 0], ties.clamp_min(1))
    head = rows > last[:, None]
    # The token that passes mu is seldom one of several, of which the first may be in the head.
    some = ties > 0
    if bool(some.any()):
        equal = rows[some] == last[some, None]
        head[some] |= equal & (equal.cumsum(-1) <= ties[some, None])
    return head.reshape(log_probs.shape)


@_head_of.register_fake
def _(log_probs: Tensor, mu: float) -> Tensor:
    return torch.empty_like(log_probs, dtype=torch.bool)


def _first_beyond(ranked: Tensor, before: Tensor | float, mu: float) -> tuple[Tensor, ...]:
    """Find the first token with which the total is above ``mu``.

    Args:
        ranked: Log-probabilities in descending order, ``(n, k)``.
        before: Total of more likely tokens, ``(n, 1)``.
        mu: The limit.

    Returns:
        Its log-probability, how many tokens that have the same are still in the head, and whether
        there is such a token, ``(n,)`` each. Where there is none, all tokens are in the head.
    """
    # Float64: the last of 100,000 float32 additions would decide which token passes mu.
    inside = before + ranked.exp().cumsum(-1, dtype=torch.float64) <= mu
    size = inside.sum(-1, keepdim=True)
    passed = size < ranked.shape[1]
    last = ranked.gather(-1, size.clamp_max(ranked.shape[1] - 1))
    ties = ((ranked == last) & inside).sum(-1, keepdim=True)
    last = last.masked_fill(~passed, -torch.inf)
    return last[:, 0], ties[:, 0].where(passed[:, 0], 2**62), passed[:, 0]


def _in_a_large_head(rows: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The same for heads of many tokens: only those of about the last one's probability are ranked."""
    bucket = (rows * -_PER_NAT).clamp_(0, _BUCKETS - 1).long()
    mass = torch.zeros(len(rows), _BUCKETS, dtype=torch.float64, device=rows.device)
    total = mass.scatter_add_(-1, bucket, rows.exp().double()).cumsum(-1)
    whole = (total <= mu).sum(-1, keepdim=True)
    before = total.gather(-1, (whole - 1).clamp_min(0)).where(whole > 0, 0.0)
    there = bucket == whole
    count = there.sum(-1)
    most = max(1, int(count.max()))
    near = rows.masked_fill(~there, -torch.inf).topk(most, -1).values
    last, ties, passed = _first_beyond(near, before, mu)
    # Sums in another order may differ in the last digit: it is the bucket's last token then.
    rounded = ~passed & (whole[:, 0] < _BUCKETS)
    end = near.gather(-1, (count - 1).clamp_min(0)[:, None])[:, 0]
    return last.where(~rounded, end), ties.where(~rounded, (near == end[:, None]).sum(-1) - 1)
