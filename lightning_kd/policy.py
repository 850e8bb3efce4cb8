r"""Policy gradients, apart from any model: returns, advantages and surrogate losses.

Matrices are ``(B, T)``, a row for each sequence; whatever is not a scored token is 0 and stays 0.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_kd.resuming import Resumable


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    r"""Sums of a token's reward and those after it: :math:`R_t = \sum_{k \ge t} \gamma^{k-t} r_k`.

    Computed by doubling, in :math:`\log_2 T` additions, so that no power of :math:`\gamma` is ever
    divided by: it is finite and exact for sequences of any length.

    Args:
        rewards: ``(B, T)``, 0 outside the tokens that count.
        gamma: The discount, in [0, 1].

    Example:
        >>> discounted_returns(torch.ones(1, 4), 0.5)
        tensor([[1.8750, 1.7500, 1.5000, 1.0000]])
    """
    returns, reach = rewards.clone(), 1
    while reach < returns.shape[-1] and gamma > 0:
        returns[:, :-reach] += gamma**reach * returns[:, reach:].clone()
        reach *= 2
    return returns


def tokens_left(mask: Tensor) -> Tensor:
    """Scored tokens of a row from each token on, itself included, ``(B, T)``; 0 outside the mask.

    Example:
        >>> tokens_left(torch.tensor([[False, True, True, False]]))
        tensor([[0, 2, 1, 0]])
    """
    return mask.long().flip(-1).cumsum(-1).flip(-1) * mask


def whiten(
    values: Tensor, mask: Tensor, statistics: Tensor, *, count: float | None = None
) -> Tensor:
    r"""Values with mean 0 and variance 1: :math:`(A - \mu) / \sqrt{\sigma^2 + 10^{-8}}`.

    Args:
        values: ``(B, T)``.
        mask: What is whitened; the rest stays 0.
        statistics: Sum, sum of squares and number of all values that share the mean, ``(3,)``;
            summed over micro-batches and ranks (:func:`whitening_statistics`).
        count: Divides the sums instead of the number of values.
    """
    total, squares, number = statistics.tolist()
    number = max(1.0, number if count is None else count)
    mean = total / number
    variance = max(0.0, squares / number - mean**2)
    whitened: Tensor = (values - mean) * mask / math.sqrt(variance + 1e-8)
    return whitened


def whitening_statistics(values: Tensor, mask: Tensor) -> Tensor:
    """Sum, sum of squares and number of what is whitened, in float64: ``(3,)``."""
    chosen = values[mask].double()
    return torch.stack([chosen.sum(), chosen.square().sum(), mask.sum().double()])


def leave_one_out(
    rewards: Tensor, groups: Tensor, pool_rewards: Tensor, pool_groups: Tensor
) -> Tensor:
    r"""Rewards minus the mean of the other completions of the group: unbiased advantages.

    A mean that has the completion itself in it would shrink the gradient by :math:`(G-1)/G`. A
    completion that is alone in its group has no baseline: its advantage is its reward. Advantages
    are not divided by the group's standard deviation, which would weigh easy and hard prompts
    differently (Liu et al. 2025, https://arxiv.org/abs/2503.20783).

    Args:
        rewards: Of completions that are in the pool, ``(n,)``.
        groups: Their groups, ``(n,)``.
        pool_rewards: Rewards of all completions, on all ranks, ``(m,)``.
        pool_groups: Their groups, ``(m,)``.

    Returns:
        ``(n,)``.

    References:
        Kool et al., *Buy 4 REINFORCE Samples, Get a Baseline for Free!*, 2019.

    Example:
        >>> rewards, groups = torch.tensor([3.0, 0.0, 1.0, 5.0]), torch.tensor([7, 7, 7, 8])
        >>> leave_one_out(rewards, groups, rewards, groups)
        tensor([ 2.5000, -2.0000, -0.5000,  5.0000])
    """
    same = groups[:, None] == pool_groups
    others = same.sum(-1) - 1
    baselines = ((same * pool_rewards).sum(-1) - rewards) / others.clamp(min=1)
    advantages: Tensor = torch.where(others > 0, rewards - baselines, rewards)
    return advantages


class Surrogate(Resumable, ABC):
    r"""A loss per token whose gradient is a policy gradient.

    With :math:`\rho_t = q_\theta(y_t) / \tilde q(y_t)`, the current student over what the token was
    drawn from.
    """

    @abstractmethod
    def __call__(self, log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The loss at each token.

        Args:
            log_probs: Of the current student at the sampled tokens, ``(N,)``; gradients flow here.
            sampling_log_probs: Of what the tokens were drawn from, ``(N,)``.
            advantages: ``(N,)``, without gradient.
        """


class ImportanceSampling(Surrogate):
    r"""Unclipped: :math:`-\rho_t A_t`. Unbiased, and unbounded where the student has moved far.

    Example:
        >>> log_probs = torch.tensor([0.5]).log()
        >>> ImportanceSampling()(log_probs, log_probs, torch.tensor([2.0]))
        tensor([-2.])
    """

    def __call__(self, log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The ratio times the advantage."""
        return -(log_probs - sampling_log_probs).exp() * advantages


class PPOClip(Surrogate):
    r"""Clipped: :math:`\max(-\rho_t A_t,\, -\mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_t)`.

    Args:
        low: How far below 1 the ratio counts.
        high: How far above 1 the ratio counts.

    Raises:
        ValueError: If ``low`` lies outside [0, 1] or ``high`` is negative.

    References:
        Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, Eq. 7.
        https://arxiv.org/abs/1707.06347
    """

    def __init__(self, low: float = 0.2, high: float = 0.2) -> None:
        if not 0 <= low <= 1 or high < 0:
            raise ValueError(f"low is {low} and high {high}; low must lie in [0, 1], high be >= 0")
        self.low, self.high = low, high

    def __call__(self, log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The larger of the clipped and the unclipped loss."""
        ratio = (log_probs - sampling_log_probs).exp()
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return torch.maximum(-ratio * advantages, -clipped * advantages)


class CISPO(Surrogate):
    r"""The weight is clipped, never the gradient: :math:`-\mathrm{sg}[\min(\rho_t, c)]A_t \log q_t`.

    Args:
        ceiling: Largest weight.

    Raises:
        ValueError: If the ceiling is not positive.

    References:
        MiniMax, *MiniMax-M1*, 2025, Eq. 4. https://arxiv.org/abs/2506.13585
    """

    def __init__(self, ceiling: float = 4.0) -> None:
        if not ceiling > 0:
            raise ValueError(f"ceiling is {ceiling}; it must be positive")
        self.ceiling = ceiling

    def __call__(self, log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The weighted negative log-likelihood."""
        ratio = (log_probs.detach() - sampling_log_probs).exp().clamp(max=self.ceiling)
        return -ratio * advantages * log_probs
