"""What methods share that learn from what the student itself has sampled."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_kd.divergences import Divergence, ReverseKL
from lightning_kd.evaluation import (
    Matching,
    Sweep,
    TeacherLogits,
    TeacherToken,
    TokenLoss,
    look,
)
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.teacher import TeacherModule, require_positive
from lightning_kd.policy import ImportanceSampling, Surrogate
from lightning_kd.scoring import ScoredPositions
from lightning_kd.types import Batch


class PolicyGradientModule(TeacherModule):
    """A student whose own samples, with their log-probabilities, come with the batch.

    The callback :class:`~lightning_kd.callbacks.OnPolicyGeneration` brings them, with ``lmbda: 1``.
    Validation is on the data's completions, where it measures the reverse KL of every token.

    Args:
        temperature: Of student and teacher in the loss; completions must be sampled at the same.
        surrogate: How a ratio and an advantage become a loss.
        base: The options of :class:`~lightning_kd.modules.TeacherModule`.

    Raises:
        ValueError: If the temperature is not positive.
    """

    needs_own_samples = True
    evaluation_terms = ("reverse_kl",)

    def __init__(
        self, *, temperature: float = 1.0, surrogate: Surrogate | None = None, **base: Any
    ) -> None:
        super().__init__(**base)
        require_positive(temperature=temperature)
        self.temperature = temperature
        self.surrogate = surrogate or ImportanceSampling()

    def evaluation_loss(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """The reverse KL of student and teacher at each label."""
        return {"reverse_kl": LossTerm(self.matching(ReverseKL()))}

    def matching(self, divergence: Divergence) -> Matching:
        """A divergence from the teacher at the method's temperature."""
        return Matching(
            divergence,
            student_temperature=self.temperature,
            teacher_temperature=self.temperature,
        )

    def policy_gradient(self, batch: Batch, scores: Scores, advantages: Tensor) -> TokenLoss:
        """The surrogate loss of each sampled token with its advantage, ``(N,)``."""
        written_by = self.sampled(batch, scores, "sampling_log_probs")

        def loss(log_probs: Tensor, rows: slice) -> Tensor:
            return self.surrogate(log_probs, written_by[rows], advantages[rows])

        return TokenLoss(scores.positions.targets, loss, temperature=self.temperature)

    def teacher_at_tokens(
        self, teacher: TeacherLogits, positions: ScoredPositions, temperature: float
    ) -> Tensor:
        """The teacher's log-probabilities of the sampled tokens, ``(N,)``."""
        at_tokens = TeacherToken(positions.targets, temperature=temperature)
        return look(Sweep(None, teacher, [at_tokens]))[0]

    def sampled(self, batch: Batch, scores: Scores, key: str) -> Tensor:
        """What a rollout knows of its tokens, ``(N,)``.

        Raises:
            ValueError: If the batch is no rollout.
        """
        if key not in batch:
            raise ValueError(
                f"{type(self).__name__} learns from what the student writes, and this batch is the "
                "data's: add the callback OnPolicyGeneration with lmbda: 1"
            )
        values: Tensor = batch[key]  # type: ignore[literal-required]
        return scores.positions.of_tokens(values).to(scores.student.dtype)
