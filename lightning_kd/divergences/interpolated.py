"""A divergence from a target between student and teacher."""

import torch
from torch import Tensor

from lightning_kd.divergences.base import Divergence
from lightning_kd.divergences.log_space import weighted


class InterpolatedDivergence(Divergence):
    r"""A divergence of the student from a target that lies between the student and the teacher.

    With student :math:`q`, teacher :math:`p` and :math:`s` a copy of the student that has no gradient:

    .. math:: D_t = D(p_t, q), \qquad p_t = \mathrm{softmax}\bigl((1 - t) \log s + t \log p\bigr)

    Logits in the place of the logarithms give the same :math:`p_t`: they differ by a constant at each
    position. At :math:`t = 0` the target is the student: value and gradient are 0. At :math:`t = 1` it
    is the teacher, to the last bit. A token that either side excludes is excluded in between.

    Args:
        divergence: :math:`D`.
        share: :math:`t`, in [0, 1], ``()``. A tensor, so that code that was compiled for one serves
            for the next.

    Example:
        >>> from lightning_kd.divergences import ForwardKL
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> half = InterpolatedDivergence(ForwardKL(), torch.tensor(0.5))
        >>> half.target(student, teacher).exp()
        tensor([0.7500, 0.2500])
        >>> half(student, teacher)
        tensor(0.1308)

    References:
        Shing et al., *TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
        Transfer in Language Models*, ICLR 2025, Eq. 1. https://arxiv.org/abs/2501.16937
    """

    def __init__(self, divergence: Divergence, share: Tensor) -> None:
        self.divergence, self.share = divergence, share

    def target(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """Return the log-probabilities of the target, without a gradient, ``(..., V)``."""
        own, share = student_log_probs.detach(), self.share
        between = weighted(1 - share, own) + weighted(share, teacher_log_probs)
        # The ends as they are: another softmax would round them.
        target = torch.where(share == 1, teacher_log_probs, between.log_softmax(-1))
        return torch.where(share == 0, own, target)

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The divergence from the target."""
        target = self.target(student_log_probs, teacher_log_probs)
        return self.divergence(student_log_probs, target)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """That of the divergence, in closed form where it has one: the target is held constant."""
        target = self.target(student_log_probs, teacher_log_probs)
        return self.divergence.value_and_logit_gradient(student_log_probs, target)
