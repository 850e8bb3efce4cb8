"""Estimators of the reverse KL at tokens that a student has sampled."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import Rollout
from lightning_kd.divergences import ReverseKL
from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused import (
    AnswerKind,
    ChunkLogProbs,
    DivergenceTerm,
    SquaredScore,
    TailLoss,
    TeacherAnswer,
    TokenLoss,
    TokenTerm,
    TopK,
    WeightedSum,
    token_log_probs_of,
)
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.policy_gradient import of_tokens
from lightning_kd.policy import Surrogate, discounted_returns
from lightning_kd.resuming import Resumable
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class SampledPositions:
    """Sampled tokens at the N scored positions of a rollout, and what is known of them."""

    tokens: Tensor
    """``(N,)``."""
    log_probs: Tensor
    """Of the student that generated the rollout, ``(N,)``."""
    sampling_log_probs: Tensor
    """Of what the tokens were drawn from, ``(N,)``."""
    log_ratios: Tensor
    r""":math:`\log q - \log p` of the student that generated the rollout and the teacher, of each token
    or of the chunk of text that it is in, ``(N,)``. Extrapolated from a reference, the teacher's
    probabilities need not add up to 1."""
    later: Tensor
    """Discounted sum of the log-ratios of later tokens, or of later chunks, ``(N,)``."""
    answer: TeacherAnswer
    """The teacher's."""
    student_temperature: float
    teacher_temperature: float

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        scores: Scores,
        *,
        gamma: float = 0.0,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        reference: TeacherAnswer | None = None,
        extrapolation: float = 1.0,
    ) -> Self:
        """Collect what is known of a rollout's tokens.

        Args:
            rollout: Has log-probabilities.
            scores: Of student and teacher on it.
            gamma: Discount of later tokens' log-ratios.
            student_temperature: Divides the student's logits.
            teacher_temperature: Divides the teacher's.
            reference: Answer of a reference, from which the teacher is extrapolated.
            extrapolation: How far: 0 is the reference, 1 the teacher.
        """
        assert scores.teacher is not None  # score() has put it there
        tokens, scored = scores.positions.targets, scores.positions
        own = of_tokens(scores, rollout["log_probs"])
        if isinstance(scores.teacher, ChunkLogProbs):
            ratios, later = _of_chunks(scores.teacher, scored, own, gamma)
        else:
            width = scores.student.shape[1]
            at_tokens = partial(
                token_log_probs_of, targets=tokens, width=width, temperature=teacher_temperature
            )
            teacher = at_tokens(scores.teacher)
            if reference is not None:
                other = at_tokens(reference)
                teacher = weighted(extrapolation, teacher) + weighted(1 - extrapolation, other)
            ratios = own - teacher
            later = scored.pick(_later(scored.scattered(ratios), gamma))
        return cls(
            tokens=tokens,
            log_probs=own,
            sampling_log_probs=of_tokens(scores, rollout["sampling_log_probs"]),
            log_ratios=ratios,
            later=later,
            answer=scores.teacher,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )


def _later(ratios: Tensor, gamma: float) -> Tensor:
    """Return the discounted sum of what comes after each place, ``(B, T)``."""
    returns = discounted_returns(ratios, gamma)
    return gamma * F.pad(returns[:, 1:], (0, 1))


def _of_chunks(
    answer: ChunkLogProbs, scored: ScoredPositions, own: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the log-ratio of the chunks that each token has a part in, and of later ones, ``(N,)``.

    To a token in no chunk, of the text that nothing predicts to the teacher, all chunks are later.
    """
    ratios = (answer.sums(own) - answer.log_probs.to(own.dtype)).double()
    rows = scored.rows[answer.ends]
    numbers = torch.arange(len(rows), device=rows.device)
    place = numbers - torch.searchsorted(rows, rows)  # among the chunks of the row
    table = ratios.new_zeros(scored.mask.shape).index_put((rows, place), ratios)
    later = answer.at_tokens(_later(table, gamma)[rows, place])
    of_rows = gamma * discounted_returns(table, gamma)[:, 0]
    # Sums up to each chunk: of its own, and up to it of those that the token may have ended.
    sums = F.pad(ratios.cumsum(0), (1, 0))
    inside = answer.chunks >= 0
    own_part = sums[(answer.chunks + 1).clamp(min=0)] - sums[answer.since.clamp(min=0)]
    later = later.where(inside, of_rows[scored.rows])
    return own_part.masked_fill(~inside, 0.0).to(own.dtype), later.to(own.dtype)


class ReverseKLEstimator(Resumable, ABC):
    r"""Makes a loss of a sampled token whose gradient is, on average, that of the reverse KL.

    To the gradient of the token's own reverse KL it adds the score-function estimate of its effect
    on the later ones, :math:`\nabla \log q(y_t) \sum_{k > t} \gamma^{k-t} l_k` with
    :math:`l = \log q - \log p`.
    """

    needs: ClassVar[tuple[AnswerKind, ...]]
    """Kinds of the teacher's answers that do, the best first."""

    watched: ClassVar[tuple[str, ...]] = ()
    """Names of the terms of :meth:`watch`."""

    @abstractmethod
    def loss(
        self, positions: SampledPositions, surrogate: Surrogate, coefficient: float
    ) -> TokenTerm:
        """Return the loss of each token.

        Args:
            positions: The tokens.
            surrogate: Makes a loss of a ratio and an advantage.
            coefficient: Of the reverse KL.
        """

    def watch(
        self, positions: SampledPositions, surrogate: Surrogate, coefficient: float
    ) -> Mapping[str, LossTerm]:
        """Return terms that are logged and not trained on, by the names of :attr:`watched`.

        Args:
            positions: The tokens.
            surrogate: That of the loss.
            coefficient: That of the loss.
        """
        return {}


class SampledToken(ReverseKLEstimator):
    r"""The log-ratio of the sampled token alone.

    The loss is the surrogate of the advantage :math:`-c\,\sum_{k \ge t} \gamma^{k-t} l_k`, where
    :math:`l = \log q - \log p` with the student :math:`q` as it was when the completion was sampled.
    It needs no more of the teacher than the log-probability of each token.

    From a teacher with other tokens, :math:`l` is that of the chunk of text that a token is in, and
    :math:`k` counts chunks: each token of a chunk has the chunk's advantage. Where a chunk has ended
    because of what the token is, that chunk's is added. With :math:`\gamma = 1` that is, on average,
    the gradient of :math:`E_q[\log q(\text{tokens}) - \log p(\text{text})]`.
    """

    needs = ("token_log_probs", "top_k_and_token", "full_distribution", "chunk_log_probs")

    def loss(
        self, positions: SampledPositions, surrogate: Surrogate, coefficient: float
    ) -> TokenTerm:
        """Return the surrogate loss."""
        advantages = -coefficient * (positions.log_ratios + positions.later)

        def loss(log_probs: Tensor, rows: slice) -> Tensor:
            return surrogate(log_probs, positions.sampling_log_probs[rows], advantages[rows])

        return TokenLoss(positions.tokens, loss, temperature=positions.student_temperature)


class CorrectedTopK(ReverseKLEstimator):
    r"""The reverse KL over the teacher's k tokens and their tail, corrected by the sampled token.

    With :math:`S` the k tokens, :math:`Q` and :math:`P` the probability that student and teacher give
    to all others together, and :math:`l = \log q - \log p`, the reverse KL of all tokens is

    .. math:: KL(q \| p) = \sum_{v \in S} q(v)\, l(v) + Q \log \frac{Q}{P}
        + \sum_{v \notin S} q(v) \Bigl(l(v) - \log \frac{Q}{P}\Bigr)

    The first two are computed as they are, with their gradient. The gradient of the last is estimated
    by the sampled token, and the loss is

    .. math:: c\,\Bigl[\sum_{v \in S} q(v)\, l(v) + Q \log \frac{Q}{P}\Bigr] - \rho_t A_t, \qquad
        A_t = -c\,\Bigl[1[y_t \notin S]\,\bigl(l(y_t) - \log \tfrac{Q}{P}\bigr)
        + \sum_{k > t} \gamma^{k-t} l_k\Bigr]

    (or another surrogate of the ratio :math:`\rho_t` and the advantage :math:`A_t`, which has no
    gradient). All but the :math:`l_k` of later tokens is of the current student. So at every prefix
    the expected gradient is that of the reverse KL of the current student over all tokens, whichever
    student or mixture the token was drawn from: the ratio is its importance weight. How often a
    prefix is reached is left to what has sampled. With :math:`\gamma = 0` on fresh rollouts that is the
    gradient of the summed reverse KL of the tokens, and with :math:`\gamma = 1` of the reverse KL
    between sequences.

    It varies less than :class:`SampledToken`, the less the more probability the k tokens have. From
    a teacher that tells every token (``full_distribution``) nothing is left to correct: the loss is
    the reverse KL itself, and chance is in the later tokens alone.

    Logs, each as a mean like the loss's, ``corrected_gradient_noise`` and, from the same tokens,
    ``sampled_gradient_noise``: what it would be with :class:`SampledToken`, whose rewards are of the
    student that has sampled. It is :math:`\|s_t \nabla_z \log q(y_t)\|^2 / c^2` in the student's
    logits :math:`z`, with :math:`s_t` the slope of the surrogate loss in :math:`\log q(y_t)`
    (:math:`-\rho_t A_t`, or what clipping leaves of it): the mean square of the chance part of a
    token's gradient, which is its variance plus the square of what the part is on average.
    """

    needs = ("full_distribution", "top_k_and_token")
    watched = ("sampled_gradient_noise", "corrected_gradient_noise")

    def loss(
        self, positions: SampledPositions, surrogate: Surrogate, coefficient: float
    ) -> TokenTerm:
        """Return the reverse KL over the events, and the surrogate loss of what they hide."""
        events = DivergenceTerm(
            ReverseKL(),
            student_temperature=positions.student_temperature,
            teacher_temperature=positions.teacher_temperature,
        )

        def correction(log_probs: Tensor, hidden: Tensor, rows: slice) -> Tensor:
            advantages = -coefficient * (hidden + positions.later[rows])
            return surrogate(log_probs, positions.sampling_log_probs[rows], advantages)

        return WeightedSum((events, coefficient), (_tail_loss(positions, correction), 1.0))

    def watch(
        self, positions: SampledPositions, surrogate: Surrogate, coefficient: float
    ) -> Mapping[str, LossTerm]:
        """Return the squared chance part of the gradient, of both estimators."""
        rewarded = positions.log_ratios

        def slope(log_probs: Tensor, own: Tensor, rows: slice) -> Tensor:
            advantages = -coefficient * (own + positions.later[rows])
            with torch.enable_grad():
                leaf = log_probs.detach().requires_grad_()
                losses = surrogate(leaf, positions.sampling_log_probs[rows], advantages)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            return gradient / coefficient

        def sampled(log_probs: Tensor, rows: slice) -> Tensor:
            return slope(log_probs, rewarded[rows], rows)

        tau = positions.student_temperature
        factors = (
            TokenLoss(positions.tokens, sampled, temperature=tau),
            _tail_loss(positions, slope),
        )
        squares = [SquaredScore(positions.tokens, factor, temperature=tau) for factor in factors]
        return {n: LossTerm(square, 0.0) for n, square in zip(self.watched, squares, strict=True)}


def _tail_loss(
    positions: SampledPositions, function: Callable[[Tensor, Tensor, slice], Tensor]
) -> TailLoss:
    return TailLoss(
        positions.tokens,
        _in_tail(positions),
        positions.log_probs - positions.log_ratios,
        function,
        student_temperature=positions.student_temperature,
        teacher_temperature=positions.teacher_temperature,
    )


def _in_tail(positions: SampledPositions) -> Tensor:
    if isinstance(positions.answer, TopK):
        return (positions.answer.token_ids != positions.tokens[:, None]).all(-1)
    return torch.zeros_like(positions.tokens, dtype=torch.bool)
