"""MiniLLM: sequence-level reverse KL by policy gradient."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, Batch, PairedBatch, Rollout, text_of
from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import (
    CrossEntropy,
    TeacherCrossEntropy,
    TokenTerm,
    WeightedSum,
    ZeroTerm,
    token_log_probs_of,
)
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.minillm_objective import MiniLLMObjective, Paper
from lightning_kd.modules.policy_gradient import Dropout, PolicyGradientModule, of_tokens
from lightning_kd.normalization import Normalization, TokenMean
from lightning_kd.policy import PPOClip, Surrogate, whiten, whitening_statistics
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class MiniLLM(PolicyGradientModule):
    r"""Minimize the reverse KL between whole sequences, split into one step and all that follow.

    With rewards :math:`r_t = \log p(y_t) - \log q(y_t)` of tokens that the student (or, with
    ``mixture_alpha`` of the callback, a mixture :math:`\tilde p` with the teacher) has sampled:

    .. math:: \ell_t = w_t\, KL(q_t \| p_t)
        - \min(\rho_t A_t,\, \mathrm{clip}(\rho_t, 1 \pm \epsilon) A_t)

    where :math:`\rho_t = q_\theta(y_t) / \tilde p(y_t)`, :math:`w_t = q(y_t) / \tilde p(y_t)`, and the
    advantage :math:`A_t` is made of the rewards from the next token on. Rewards, advantages and
    weights are computed once, when a window of completions has been generated; ``passes`` of the
    callback trains on each window several times (the paper: 4). A second stream of plain text
    (:class:`~lightning_kd.data.PromptsAndText`) adds the language-modeling term.

    The other options are those of :class:`~lightning_kd.modules.policy_gradient.PolicyGradientModule`.

    Args:
        objective: What the advantage is made of: :class:`Paper` or :class:`OfficialCode`, each of
            whose switches can be set apart.
        text_coefficient: Weight of the term on the second stream, which is a mean over its tokens.
        surrogate: Surrogate of the policy gradient. Defaults to PPO's clipped one with
            :math:`\epsilon = 0.2`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, Eqs. 2-7.
        https://arxiv.org/abs/2306.08543
    """

    terms = ("policy_gradient", "single_step", "language_modeling")

    def __init__(
        self,
        *,
        objective: MiniLLMObjective | None = None,
        text_coefficient: float = 1.0,
        surrogate: Surrogate | None = None,
        temperature: float = 1.0,
        dropout: Dropout = "none",
        teacher: TeachersLike,
        vocabulary: VocabularyPolicy = "equal",
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        normalization: Normalization | str = "token",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            surrogate=surrogate or PPOClip(),
            temperature=temperature,
            dropout=dropout,
            teacher=teacher,
            vocabulary=vocabulary,
            student=student,
            tokenizer=tokenizer,
            normalization=normalization,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        if text_coefficient < 0:
            raise ValueError(f"text_coefficient is {text_coefficient}; it must be 0 or more")
        self.objective = objective or Paper()
        self.text_coefficient = text_coefficient

    def prepare_rollouts(self, rollouts: Sequence[Rollout], options: GenerationOptions) -> None:
        """Compute advantages from the rewards of the whole window."""
        super().prepare_rollouts(rollouts, options)
        statistics = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in rollouts:
            labeled = batch["labels"] != IGNORE_INDEX
            batch["advantages"] = self.objective.advantages(self._rewards(batch), labeled)
            statistics += whitening_statistics(batch["advantages"], labeled)
        # Padded whitening counts the tokens that a row has not: a dropped row is no row.
        kept = torch.stack([(batch["row"] != FILLER_ROW).sum() for batch in rollouts])
        rows = kept.sum(dtype=torch.float64)
        statistics, rows = self.sum_over_ranks(statistics), self.sum_over_ranks(rows)
        for batch in rollouts:
            batch["advantages"] = self._whitened(batch, statistics, rows.item(), options)

    @property
    def term_normalizations(self) -> Mapping[str, Normalization]:
        """Normalization of the term on the second stream: the mean over its tokens."""
        return {"language_modeling": TokenMean()} if self.text_coefficient > 0 else {}

    def term_positions(self, name: str, batch: Batch) -> ScoredPositions:
        """Return the positions of the second stream, where there is one."""
        text = text_of(batch)
        return self.positions(batch if text is None else text)

    def count_step(self, batches: Sequence[Batch]) -> None:
        """Count the step; blocks of text are equally long, so the first stands for all."""
        text = text_of(batches[0])
        if text is None:
            super().count_step(batches)
        else:
            paired: list[PairedBatch] = [{**batch, "text": text} for batch in batches]
            super().count_step(paired)

    def rollout_terms(self, rollout: Rollout, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the clipped policy gradient, the exact single step and the second stream's loss."""
        advantages = of_tokens(scores, rollout["advantages"])
        single_step: TokenTerm = self.divergence_term(ReverseKL())
        if self.objective.weigh_single_step:
            written_by = of_tokens(scores, rollout["sampling_log_probs"])
            log_weight = of_tokens(scores, rollout["log_probs"]) - written_by
            single_step = WeightedSum((single_step, log_weight.exp()))
        return {
            "policy_gradient": LossTerm(self.policy_gradient(rollout, scores, advantages)),
            "single_step": LossTerm(single_step),
            "language_modeling": self._language_modeling(rollout),
        }

    def _rewards(self, batch: Rollout) -> Tensor:
        """Compute scaled and clipped log-ratios of teacher and student at tokens, ``(B, T)``."""
        positions = ScoredPositions.from_labels(batch["labels"])
        logits = self.teacher_answer(batch, positions).narrowed(self.width)
        temperature = self.objective.reward_temperature or self.temperature
        teacher = token_log_probs_of(logits, positions.targets, self.width, temperature=temperature)
        own = positions.of_tokens(batch["log_probs"]).to(teacher.dtype)
        return positions.at_tokens(self.objective.reward(teacher - own))

    def _whitened(
        self, batch: Rollout, statistics: Tensor, rows: float, options: GenerationOptions
    ) -> Tensor:
        labeled = batch["labels"] != IGNORE_INDEX
        if self.objective.whitening == "none":
            return batch["advantages"]
        count = rows * options.max_new_tokens if self.objective.whitening == "padded" else None
        return whiten(batch["advantages"], labeled, statistics, count=count)

    def _language_modeling(self, batch: Batch) -> LossTerm:
        """Return the loss on the second stream, a mean over its tokens in the step."""
        text = text_of(batch)
        if text is None or self.text_coefficient == 0:
            return LossTerm(ZeroTerm(), 0.0)
        ratio = self.objective.text_kd_ratio
        # Without a share of the teacher it need not read the text.
        scores = self.score(text) if ratio > 0 else DistillationModule.score(self, text)
        targets = scores.positions.targets
        loss: TokenTerm = CrossEntropy(targets)
        if ratio > 0:
            loss = WeightedSum((loss, 1 - ratio), (TeacherCrossEntropy(), ratio))
        return LossTerm(loss, self.text_coefficient, scores=scores)
