"""The generalized Jensen-Shannon divergence of GKD."""

import torch
from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.forward_kl import ForwardKL
from lightning_kd.divergences.log_space import (
    LIMIT_WIDTH,
    kl_terms,
    log_ratio_to_mixture,
    mixture_log_ratios,
)
from lightning_kd.divergences.reverse_kl import ReverseKL


@register_divergence("generalized_jsd")
class GeneralizedJSD(Divergence):
    r"""Generalized Jensen-Shannon divergence: both sides against their mixture, hence bounded.

    With :math:`q` the student, :math:`p` the teacher and :math:`m = \beta p + (1 - \beta) q`:

    .. math:: D = \beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)

    ``beta`` weighs the teacher; exchanging the two sides is exchanging ``beta`` for ``1 - beta``.
    At most the entropy of a coin with bias ``beta``, so at most log 2. Finite, also where a side
    excludes tokens.

    The formula is 0 at both ends; ``beta`` of exactly 0 and 1 mean the forward and the reverse KL
    by convention. So the value jumps there: near 0 it is about ``beta`` times the forward KL, near
    1 about ``1 - beta`` times the reverse KL. ``normalized`` divides by ``beta (1 - beta)``, which
    multiplies by 4 in the middle and makes the family continuous. Within 1e-4 of an end the
    normalized value is that end's KL, since float32 would lose the quotient.

    Args:
        beta: Weight of the teacher, in [0, 1].
        normalized: Divide by ``beta (1 - beta)``.

    Raises:
        ValueError: If ``beta`` is outside [0, 1].

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> GeneralizedJSD()(student, teacher)
        tensor(0.1017)
        >>> GeneralizedJSD(beta=0.01, normalized=True)(student, teacher)
        tensor(0.3685)

    References:
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Eq. 1.
        https://arxiv.org/abs/2306.13649
    """

    def __init__(self, beta: float = 0.5, normalized: bool = False) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(
                f"beta is {beta}, expected a weight of the teacher in [0, 1]: use 0 for the "
                "forward KL, 1 for the reverse KL, 0.5 for the symmetric divergence"
            )
        self.beta = beta
        self.normalized = normalized
        self._scale = 1.0
        self._end: Divergence | None = None
        width = LIMIT_WIDTH if normalized else 0.0
        if beta == 0 or beta < width:
            self._end = ForwardKL()
        elif beta == 1 or 1 - beta < width:
            self._end = ReverseKL()
        elif normalized:
            self._scale = 1 / (beta * (1 - beta))

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``beta KL(p || m) + (1 - beta) KL(q || m)``, or the KL of an end."""
        if self._end is not None:
            return self._end.value(student_log_probs, teacher_log_probs)
        against_student = log_ratio_to_mixture(
            teacher_log_probs, student_log_probs, own_share=self.beta, other_share=1 - self.beta
        )
        against_teacher = log_ratio_to_mixture(
            student_log_probs, teacher_log_probs, own_share=1 - self.beta, other_share=self.beta
        )
        teacher_side = self.beta * kl_terms(teacher_log_probs, against_student).sum(-1)
        student_side = (1 - self.beta) * kl_terms(student_log_probs, against_teacher).sum(-1)
        return self._scale * (teacher_side + student_side)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``(1 - beta) q [(log q - log m) - KL(q || m)]``, or those of an end."""
        if self._end is not None:
            return self._end.value_and_logit_gradient(student_log_probs, teacher_log_probs)
        to_student, to_teacher = mixture_log_ratios(
            student_log_probs, teacher_log_probs, beta=self.beta
        )
        student_probs = student_log_probs.exp()
        slope = to_student.mul_(student_probs).mul_(self._scale * (1 - self.beta))
        student_side = slope.sum(-1)
        teacher_side = to_teacher.mul_(teacher_log_probs.exp()).sum(-1)
        value = torch.add(student_side, teacher_side, alpha=self._scale * self.beta)
        return value, slope.addcmul_(student_probs, student_side.unsqueeze(-1), value=-1)
