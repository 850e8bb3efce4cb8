"""Reinforcement learning and distillation at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.generation import GenerationOptions, completion_texts
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.policy_gradient import PolicyGradientModule
from lightning_kd.policy import PPOClip, Surrogate, group_means
from lightning_kd.rewards import RewardFunction
from lightning_kd.types import FILLER_ROW, IGNORE_INDEX, Batch


class RLDistillation(PolicyGradientModule):
    r"""Raise a reward of whole completions and stay close to a teacher.

    .. math:: \max_\theta\; E_{x}\Bigl[(1 - \alpha)\, E_{y \sim q} [r(y)]
        - \alpha\, E_{y \sim q} \bigl[D(p \| q)(y | x)\bigr]\Bigr]

    The reward's gradient is a policy gradient with the reward minus the mean of its prompt's group
    (``group_size`` of the callback) as every token's advantage. At its first iteration the policy
    gradient term is 0 under the ``sequence`` normalization; its gradient is not.

    Args:
        rewards: Import paths of reward functions (:mod:`lightning_kd.rewards`), or the functions.
        reward_weights: One weight for each; 1 when not given.
        alpha: Weight of the divergence against the reward, in [0, 1].
        divergence: A registered name or a :class:`~lightning_kd.divergences.Divergence`. With a
            reward, the paper advises the reverse KL or the generalized JSD with ``beta`` 0.9.
        surrogate: PPO's clipped surrogate when not given.
        base: The options of :class:`~lightning_kd.modules.policy_gradient.PolicyGradientModule`.

    Raises:
        ValueError: If a value is out of its range, or a reward function does not keep its contract.

    References:
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Eq. 5.
        https://arxiv.org/abs/2306.13649
    """

    terms = ("policy_gradient", "divergence")

    def __init__(
        self,
        *,
        rewards: list[RewardFunction],
        reward_weights: list[float] | None = None,
        alpha: float = 0.5,
        divergence: Divergence | str = "reverse_kl",
        surrogate: Surrogate | None = None,
        **base: Any,
    ) -> None:
        super().__init__(surrogate=surrogate or PPOClip(), **base)
        if not rewards:
            raise ValueError(
                "rewards is empty; name at least one, lightning_kd.rewards.exact_match"
            )
        weights = [1.0] * len(rewards) if reward_weights is None else reward_weights
        if len(weights) != len(rewards):
            raise ValueError(f"{len(weights)} reward_weights came for {len(rewards)} rewards")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it weighs divergence against reward, in [0, 1]")
        self.rewards, self.reward_weights = rewards, weights
        self.alpha, self.divergence = alpha, make_divergence(divergence)

    def prepare_rollouts(self, rollouts: Sequence[Batch], options: GenerationOptions) -> None:
        """Rewards of the window's completions, centered in their groups over all ranks."""
        real = torch.cat([batch["row"] != FILLER_ROW for batch in rollouts])
        groups = torch.cat([batch["group"] for batch in rollouts])
        rewards = torch.cat([self._reward(batch) for batch in rollouts])
        pooled = self._of_all_ranks(torch.stack([rewards, groups.double(), real.double()]))
        pool = pooled[:, pooled[2] > 0]
        baselines = group_means(groups, pool[0], pool[1].long())
        if len(set(pooled[1].tolist())) == pooled.shape[1]:
            raise ValueError(
                "every prompt has one completion, which is its own baseline, so that all "
                "advantages are 0: give the callback OnPolicyGeneration a group_size of 2 or more"
            )
        self.log("train/reward", pool[0].mean() if pool.numel() else 0.0, prog_bar=True)
        sizes = [len(batch["row"]) for batch in rollouts]
        centered = torch.split((rewards - baselines) * real, sizes)
        for batch, advantages in zip(rollouts, centered, strict=True):
            batch["advantages"] = advantages[:, None] * (batch["labels"] != IGNORE_INDEX)

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """The policy gradient of the reward and the divergence, at each sampled token."""
        reinforced = self.policy_gradient(batch, scores, self.sampled(batch, scores, "advantages"))
        return {
            "policy_gradient": LossTerm(reinforced, 1 - self.alpha),
            "divergence": LossTerm(self.matching(self.divergence), self.alpha),
        }

    def _reward(self, batch: Batch) -> Tensor:
        """The weighted sum of the rewards of each completion, ``(B,)``."""
        columns: dict[str, Any] = {
            "prompts": batch["prompt"],
            "completions": completion_texts(batch, self.tokenizer),
            "references": batch["completion"],
            **batch.get("extra", {}),
        }
        total = torch.zeros(len(batch["row"]), dtype=torch.float64)
        for function, weight in zip(self.rewards, self.reward_weights, strict=True):
            values = torch.as_tensor(function(**columns), dtype=torch.float64)
            if values.shape != total.shape or not values.isfinite().all():
                name = getattr(function, "__name__", repr(function))
                raise ValueError(
                    f"the reward {name} gave {values.tolist()!s:.100} for {len(total)} completions; "
                    "it must give one finite number for each"
                )
            total += weight * values
        return total.to(batch["labels"].device)

    def _of_all_ranks(self, columns: Tensor) -> Tensor:
        gathered = self.all_gather(columns)
        assert isinstance(gathered, Tensor)  # as it was given
        return gathered.reshape(-1, *columns.shape).transpose(0, 1).reshape(len(columns), -1)
