"""The total variation distance."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import softmax_gradient


@register_divergence("total_variation")
class TotalVariation(Divergence):
    r"""Total variation distance: the largest difference in probability of any event.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = \tfrac{1}{2} \sum_v |p(v) - q(v)|

    A metric in [0, 1]. Pinsker's inequality bounds it by :math:`\sqrt{D_\mathrm{KL} / 2}` and that
    of Bretagnolle and Huber by :math:`\sqrt{1 - e^{-D_\mathrm{KL}}}`, for either KL. Its gradient
    does not fade near agreement, where it has a kink, and nearly vanishes on tokens to which both
    the student and the teacher give little probability.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> TotalVariation()(student, teacher)
        tensor(0.4000)

    References:
        Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*,
        ACL 2023. https://arxiv.org/abs/2307.15190
    """

    order = 1

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``sum |p - q| / 2``."""
        return 0.5 * (teacher_log_probs.exp() - student_log_probs.exp()).abs().sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``q [s - sum(q s)] / 2`` with ``s`` the sign of ``q - p``."""
        student_probs = student_log_probs.exp()
        difference = student_probs - teacher_log_probs.exp()
        slope = 0.5 * student_probs * difference.sign()
        return 0.5 * difference.abs().sum(-1), softmax_gradient(slope, student_log_probs)
