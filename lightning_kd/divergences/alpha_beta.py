"""The alpha-beta divergence of ABKD."""

import math

import torch
from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import LIMIT_WIDTH, expm1_, kl_terms, softmax_gradient


@register_divergence("alpha_beta")
class AlphaBeta(Divergence):
    r"""Alpha-beta divergence: two exponents span the forward KL, the reverse KL and much else.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = -\frac{1}{\alpha\beta} \sum_v \Bigl[ p^\alpha q^\beta
              - \frac{\alpha}{\alpha + \beta}\,p^{\alpha + \beta}
              - \frac{\beta}{\alpha + \beta}\,q^{\alpha + \beta} \Bigr]

    and the analytic limits where a denominator vanishes (or is within 1e-4 of it, where float32
    would lose the quotient):

    .. math::
        \beta = 0:\quad & \tfrac{1}{\alpha^2} \sum_v \bigl[ p^\alpha \log (p/q)^\alpha
            - p^\alpha + q^\alpha \bigr] \\
        \alpha = 0:\quad & \tfrac{1}{\beta^2} \sum_v \bigl[ q^\beta \log (q/p)^\beta
            - q^\beta + p^\beta \bigr] \\
        \alpha = -\beta:\quad & \tfrac{1}{\alpha^2} \sum_v \bigl[ (p/q)^\alpha - 1
            - \log (p/q)^\alpha \bigr] \\
        \alpha = \beta = 0:\quad & \tfrac{1}{2} \sum_v \log^2 (p/q)

    ``(1, 0)`` is the forward KL, ``(0, 1)`` the reverse KL, ``(0.5, 0.5)`` four times the squared
    Hellinger distance, ``(1, 1)`` half the squared Euclidean distance. Exchanging the two sides is
    exchanging ``alpha`` and ``beta``. With both exponents positive it is finite also where a side
    excludes tokens. A negative exponent, or a sum of 0, makes it infinite there, and large enough
    to overflow float32 at a log-probability of -90 or so; a negative sum would let the rarest
    tokens of the vocabulary dominate, and is refused.

    Args:
        alpha: Exponent of the teacher's probability.
        beta: Exponent of the student's probability.

    Raises:
        ValueError: If an exponent is not finite, or if their sum is negative.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> AlphaBeta(alpha=0.2, beta=0.7)(student, teacher)
        tensor(0.5183)

    References:
        Wang et al., *ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
        Distillation via alpha-beta-Divergence*, ICML 2025. https://arxiv.org/abs/2505.04560

        Cichocki et al., *Generalized Alpha-Beta Divergences and Their Application to Robust
        Nonnegative Matrix Factorization*, Entropy 13(1), 2011. https://doi.org/10.3390/e13010134
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7) -> None:
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise ValueError(
                f"alpha is {alpha} and beta {beta}, expected two finite exponents, such as the "
                "default 0.2 and 0.7"
            )
        if alpha + beta <= -LIMIT_WIDTH:
            raise ValueError(
                f"alpha + beta is {alpha + beta}, expected at least 0: raise one of the exponents "
                f"(alpha is {alpha}, beta {beta})"
            )
        self.alpha = alpha
        self.beta = beta
        self._alpha = alpha if abs(alpha) >= LIMIT_WIDTH else 0.0
        self._beta = beta if abs(beta) >= LIMIT_WIDTH else 0.0
        if abs(self._alpha + self._beta) < LIMIT_WIDTH:
            self._beta = -self._alpha

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The formula, or the limit that holds at these exponents."""
        student, teacher = _without_shared_zeros(student_log_probs, teacher_log_probs)
        alpha, beta = self._alpha, self._beta
        if alpha + beta == 0:
            return _scale_free(student, teacher, alpha)
        if beta == 0:
            return _tempered_kl(teacher, student, alpha)
        if alpha == 0:
            return _tempered_kl(student, teacher, beta)

        total, log_ratio = alpha + beta, student - teacher
        log_power = total * teacher
        student_excess = _difference(total * student, log_power, total * log_ratio)
        cross_excess = _difference(alpha * teacher + beta * student, log_power, beta * log_ratio)
        return (beta / total * student_excess - cross_excess).sum(-1) / (alpha * beta)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``q^beta (q^alpha - p^alpha) / alpha``, centered.

        At an ``alpha`` of 0 a logarithm takes the place of the powers.
        """
        student, teacher = _without_shared_zeros(student_log_probs, teacher_log_probs)
        alpha, beta = self._alpha, self._beta
        log_ratio = student - teacher
        if alpha != 0:
            cross = alpha * teacher + beta * student
            slope = _difference((alpha + beta) * student, cross, alpha * log_ratio) / alpha
        elif beta != 0:
            slope = kl_terms(beta * student, log_ratio)
        else:
            slope = log_ratio
        value = self.value(student_log_probs, teacher_log_probs)
        return value, softmax_gradient(slope, student_log_probs)


def _without_shared_zeros(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Let both sides agree, in finite numbers, on a token that both exclude."""
    excluded = torch.maximum(student, teacher) == -math.inf
    return student.masked_fill(excluded, 0.0), teacher.masked_fill(excluded, 0.0)


def _difference(log_first: Tensor, log_second: Tensor, log_ratio: Tensor) -> Tensor:
    """Difference of two powers whose ratio is known better than the powers are.

    Exactly 0 at agreement, without cancellation near it and without overflow far from it.
    """
    larger = torch.maximum(log_first, log_second).exp()
    # Not sign() and abs(), whose derivative at 0 is 0: agreement would lose half of its gradient.
    direction = torch.ones_like(log_ratio).copysign(log_ratio.detach())
    return -larger * direction * expm1_(-direction * log_ratio)


def _tempered_kl(log_probs: Tensor, log_reference: Tensor, exponent: float) -> Tensor:
    """KL of unnormalized powers: the limit as the exponent of ``log_reference`` vanishes."""
    log_power, log_reference_power = exponent * log_probs, exponent * log_reference
    log_ratio = exponent * (log_probs - log_reference)
    excess = _difference(log_power, log_reference_power, log_ratio)
    return (kl_terms(log_power, log_ratio) - excess).sum(-1) / exponent**2


def _scale_free(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The limits that read nothing but the ratio of the probabilities."""
    log_ratio = teacher - student
    if alpha == 0:
        return 0.5 * log_ratio.square().sum(-1)
    log_power = alpha * log_ratio
    # Past 50 the subtrahend is below the round-off of exp, while inf - inf would be NaN.
    return (expm1_(log_power.clone()) - log_power.clamp_max(50.0)).sum(-1) / alpha**2
