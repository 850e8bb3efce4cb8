"""Reinforcement learning and distillation at once."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, Rollout
from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.generation import Engine, GenerationOptions, completion_texts
from lightning_kd.loops.progress import show
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.policy_gradient import Dropout, PolicyGradientModule, of_tokens
from lightning_kd.normalization import Normalization, make_normalization
from lightning_kd.policy import PPOClip, Surrogate, leave_one_out
from lightning_kd.rewards import RewardFunction
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class RLDistillation(PolicyGradientModule):
    r"""Raise a reward of whole completions and stay close to a teacher.

    .. math:: \max_\theta\; E_{x}\Bigl[(1 - \alpha)\, E_{y \sim q} [r(y)]
        - \alpha\, E_{y \sim q} \bigl[D(p \| q)(y | x)\bigr]\Bigr],
        \qquad D(p \| q)(y | x) = \frac{1}{|y|} \sum_t D(p_t \| q_t)

    with no gradient through the sampling of the divergence. Over the :math:`B` completions
    :math:`y_b` of a step the loss is

    .. math:: L = \frac{1}{B} \sum_b \Bigl[(1 - \alpha) \sum_t -\rho_{b,t} A_b
        + \frac{\alpha}{|y_b|} \sum_t D(p_{b,t} \| q_{b,t})\Bigr],
        \qquad A_b = r(y_b) - \frac{1}{G - 1} \sum_{j \ne b} r(y_j)

    where :math:`j` runs over the other completions of the same prompt (``group_size`` of the
    callback). Its expected gradient is that of the objective (with PPO's clipping, on fresh
    rollouts). A completion that is alone, or the only one of its group that was not dropped, has
    no baseline: its advantage is its reward, which is as right and varies more. A masked completion
    still counts in the baselines of the others.

    The reward's term is summed over a completion, for the probability of a completion is a product
    over its tokens, and the divergence is averaged over it. Each has a normalization of its own;
    what the reward's becomes under another one:

    - ``token`` divides the sum over all completions by all their tokens: the default divided by the
      mean length of the step, so that :math:`\alpha` weighs something else.
    - ``sequence`` divides each completion's gradient by its length, so that short ones count for
      more: not the gradient of an expected reward. The term is then exactly 0 on fresh rollouts in
      groups of 2 or more; its gradient is not.
    - ``ConstantLength`` is the default divided by a constant.

    The other options are those of :class:`~lightning_kd.modules.policy_gradient.PolicyGradientModule`.

    Args:
        rewards: Import paths of reward functions (:mod:`lightning_kd.rewards`), or the functions.
        reward_weights: One weight for each. Defaults to 1.
        alpha: Weight of the divergence against the reward, in [0, 1].
        divergence: A registered name or a :class:`~lightning_kd.divergences.Divergence`. With a
            reward, the paper advises the reverse KL or the generalized JSD with ``beta`` 0.9.
        surrogate: Surrogate of the policy gradient. Defaults to PPO's clipped one.
        normalization: What the divergence is divided by, and the loss in validation.
        reward_normalization: What the reward's term is divided by.

    Raises:
        ValueError: If a value is out of its range, or a reward function does not keep its contract.

    References:
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Eq. 5.
        https://arxiv.org/abs/2306.13649
    """

    terms = ("policy_gradient", "divergence")
    needs = ("full_distribution", "top_k", "top_k_and_token")
    learns_from_its_start = True  # from rewards; a teacher that is the start keeps it near there

    def __init__(
        self,
        *,
        rewards: list[RewardFunction],
        reward_weights: list[float] | None = None,
        alpha: float = 0.5,
        divergence: Divergence | str = "reverse_kl",
        surrogate: Surrogate | None = None,
        normalization: Normalization | str = "sequence",
        reward_normalization: Normalization | str = "batch",
        temperature: float = 1.0,
        dropout: Dropout = "none",
        teacher: TeachersLike,
        vocabulary: VocabularyPolicy = "equal",
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            surrogate=surrogate or PPOClip(),
            normalization=normalization,
            temperature=temperature,
            dropout=dropout,
            teacher=teacher,
            vocabulary=vocabulary,
            student=student,
            tokenizer=tokenizer,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        self.reward_normalization = make_normalization(reward_normalization)
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

    def prepare_rollouts(self, rollouts: Sequence[Rollout], options: GenerationOptions) -> None:
        """Compute advantages of the window's completions in their groups, over all ranks."""
        super().prepare_rollouts(rollouts, options)
        real = torch.cat([batch["row"] != FILLER_ROW for batch in rollouts])
        groups = torch.cat([batch["group"] for batch in rollouts])
        rewards = torch.cat([self._reward(batch) for batch in rollouts])
        pooled = self._of_all_ranks(torch.stack([rewards, groups.double(), real.double()]))
        pool = pooled[:, pooled[2] > 0]
        advantages = leave_one_out(rewards, groups, pool[0], pool[1].long()) * real
        if len(set(pooled[1].tolist())) == pooled.shape[1]:
            rank_zero_warn(
                "every prompt has one completion, and no baseline: its advantage is its reward, "
                "which varies much. Give the callback OnPolicyGeneration a group_size of 2 or more"
            )
        reward = float(pool[0].mean()) if pool.numel() else 0.0
        self.log("train/reward", reward)
        show(self.trainer, "train/reward", reward)
        sizes = [len(batch["row"]) for batch in rollouts]
        for batch, of_rows in zip(rollouts, torch.split(advantages, sizes), strict=True):
            batch["advantages"] = of_rows[:, None] * (batch["labels"] != IGNORE_INDEX)

    @property
    def term_normalizations(self) -> Mapping[str, Normalization]:
        """Normalization of the reward's term."""
        return {"policy_gradient": self.reward_normalization}

    def rollout_terms(self, rollout: Rollout, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the policy gradient of the reward and the divergence, at each sampled token."""
        advantages = of_tokens(scores, rollout["advantages"])
        reinforced = self.policy_gradient(rollout, scores, advantages)
        return {
            "policy_gradient": LossTerm(reinforced, 1 - self.alpha),
            "divergence": LossTerm(self.divergence_term(self.divergence), self.alpha),
        }

    def _reward(self, batch: Rollout) -> Tensor:
        """Compute the weighted sum of the rewards of each completion, ``(B,)``."""
        columns: dict[str, Any] = {
            "prompts": batch["prompt"],
            "completions": completion_texts(batch, self.tokenizer),
            "references": batch["completion"],
            **batch.get("extra", {}),
        }
        total = torch.zeros(len(batch["row"]), dtype=torch.float64)
        for function, weight in zip(self.rewards, self.reward_weights, strict=True):
            name = getattr(function, "__name__", repr(function))
            try:
                inspect.signature(function).bind(**columns)
            except TypeError as error:
                raise ValueError(
                    f"the reward {name} does not take what it is given ({error}): it takes "
                    f"{', '.join(columns)} by name, and **_ for what it does not use"
                ) from error
            given = function(**columns)
            try:
                values = torch.as_tensor(given, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):  # None for one, or no numbers at all
                values = torch.empty(0)
            if values.shape != total.shape or not values.isfinite().all():
                raise ValueError(
                    f"the reward {name} gave {given!s:.100} for {len(total)} completions; "
                    "it must give one finite number for each"
                )
            total += weight * values
        return total.to(batch["labels"].device)

    def _of_all_ranks(self, columns: Tensor) -> Tensor:
        gathered = self.all_gather(columns)
        assert isinstance(gathered, Tensor)  # as it was given
        return gathered.reshape(-1, *columns.shape).transpose(0, 1).reshape(len(columns), -1)
