"""The Jeffreys divergence: both KL divergences at once."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.forward_kl import ForwardKL
from lightning_kd.divergences.reverse_kl import ReverseKL


@register_divergence("jeffreys")
class Jeffreys(Divergence):
    r"""Jeffreys divergence: the sum, not the mean, of the forward and the reverse KL.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = \mathrm{KL}(p \| q) + \mathrm{KL}(q \| p)
              = \sum_v [p(v) - q(v)]\,[\log p(v) - \log q(v)]

    Symmetric. Infinite where either side excludes a token that the other allows.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> Jeffreys()(student, teacher)
        tensor(0.8789)

    References:
        Jeffreys, *An Invariant Form for the Prior Probability in Estimation Problems*, Proceedings
        of the Royal Society A 186, 1946. https://doi.org/10.1098/rspa.1946.0056
    """

    _forward, _reverse = ForwardKL(), ReverseKL()

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``KL(teacher || student) + KL(student || teacher)``."""
        forward = self._forward.value(student_log_probs, teacher_log_probs)
        return forward + self._reverse.value(student_log_probs, teacher_log_probs)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sums of both."""
        forward = self._forward.value_and_logit_gradient(student_log_probs, teacher_log_probs)
        reverse = self._reverse.value_and_logit_gradient(student_log_probs, teacher_log_probs)
        return forward[0] + reverse[0], forward[1] + reverse[1]
