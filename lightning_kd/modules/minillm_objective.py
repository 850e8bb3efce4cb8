"""Differences between MiniLLM's paper and its official code, each of them a switch."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_kd.policy import discounted_returns, tokens_left

ReturnFrom = Literal["next", "current"]
LengthNorm = Literal["none", "remaining", "paper"]
Whitening = Literal["none", "tokens", "padded"]


@dataclass(frozen=True)
class MiniLLMObjective:
    r"""Computation of the advantage, and other switches.

    Attributes:
        return_from: ``next``: :math:`R_{t+1} = \sum_{k > t} \gamma^{k-t-1} r_k`, so that the single
            step is not counted twice; ``current``: :math:`R_t`, which counts it twice.
        gamma: The discount, in [0, 1].
        length_norm: What the return is divided by: ``none``; ``remaining``, the number of rewards in
            it; ``paper``, :math:`T - t - 1` as Eq. 6 has it, at least 1.
        whitening: Subtract the mean and divide by the standard deviation of all advantages of a
            window: not at all, over its ``tokens``, or over its rows ``padded`` to the longest
            completion that was allowed.
        weigh_single_step: Weigh the single-step term by :math:`w_t`.
        reward_scale: Divides the rewards.
        reward_clip: Bounds the scaled rewards on both sides.
        reward_temperature: Temperature of the teacher in the rewards. Defaults to the method's.
        text_kd_ratio: Share of the teacher's cross-entropy in the term on plain text.

    Raises:
        ValueError: If a value is out of its range.
    """

    return_from: ReturnFrom
    gamma: float
    length_norm: LengthNorm
    whitening: Whitening
    weigh_single_step: bool
    reward_scale: float
    reward_clip: float | None
    reward_temperature: float | None
    text_kd_ratio: float

    def __post_init__(self) -> None:
        """Check the values."""
        for name, choices in (
            ("return_from", get_args(ReturnFrom)),
            ("length_norm", get_args(LengthNorm)),
            ("whitening", get_args(Whitening)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {choices}")
        for name in ("gamma", "text_kd_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("reward_scale", "reward_clip", "reward_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")

    def reward(self, log_ratios: Tensor) -> Tensor:
        """Return scaled and clipped rewards, of any shape."""
        rewards = log_ratios / self.reward_scale
        clip = self.reward_clip
        return rewards if clip is None else rewards.clamp(-clip, clip)

    def advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Compute returns, normalized by length: ``(B, T), (B, T) -> (B, T)``, 0 outside the mask."""
        returns = discounted_returns(rewards * mask, self.gamma)
        number = tokens_left(mask)
        if self.return_from == "next":
            returns = torch.nn.functional.pad(returns[:, 1:], (0, 1))
            number = number - 1
        if self.length_norm == "paper":
            # With T - t tokens after this one, T - t - 1 is one less than the rewards in R_{t+1}.
            number = tokens_left(mask) - 2
        if self.length_norm != "none":
            returns = returns / number.clamp(min=1)
        return returns * mask


@dataclass(frozen=True)
class Paper(MiniLLMObjective):
    """The paper's objective, its equations 3 to 7."""

    return_from: ReturnFrom = "next"
    gamma: float = 1.0
    length_norm: LengthNorm = "paper"
    whitening: Whitening = "none"
    weigh_single_step: bool = True
    reward_scale: float = 1.0
    reward_clip: float | None = None
    reward_temperature: float | None = None
    text_kd_ratio: float = 0.0


@dataclass(frozen=True)
class OfficialCode(MiniLLMObjective):
    """The objective of the authors' code, with the values of its scripts.

    https://github.com/microsoft/LMOps/tree/main/minillm
    """

    return_from: ReturnFrom = "current"
    gamma: float = 0.95
    length_norm: LengthNorm = "remaining"
    whitening: Whitening = "padded"
    weigh_single_step: bool = False
    reward_scale: float = 0.5
    reward_clip: float | None = 100.0
    reward_temperature: float | None = 1.0
    text_kd_ratio: float = 0.5
