"""The forward KL divergence, the loss of classical distillation."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import kl_terms


@register_divergence("forward_kl")
class ForwardKL(Divergence):
    r"""Forward KL divergence: the student covers whatever the teacher may say.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = \mathrm{KL}(p \| q) = \sum_v p(v)\,[\log p(v) - \log q(v)]

    The teacher's entropy is included, so the value is zero at agreement; a cross-entropy with the
    teacher's probabilities has the same gradient, :math:`q - p`. Infinite where the student
    excludes a token that the teacher allows. A token that the teacher excludes contributes 0.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> ForwardKL()(student, teacher)
        tensor(0.3681)

    References:
        Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, Section 2.
        https://arxiv.org/abs/1503.02531

        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Eq. 3.
        https://arxiv.org/abs/2306.13649
    """

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``KL(teacher || student)``."""
        return kl_terms(teacher_log_probs, teacher_log_probs - student_log_probs).sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``q - p``."""
        value = self.value(student_log_probs, teacher_log_probs)
        return value, student_log_probs.exp() - teacher_log_probs.exp()
