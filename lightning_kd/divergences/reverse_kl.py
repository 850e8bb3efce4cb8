"""The reverse KL divergence, the loss of most on-policy distillation."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import kl_terms, softmax_gradient


@register_divergence("reverse_kl")
class ReverseKL(Divergence):
    r"""Reverse KL divergence: the student looks for a mode of the teacher.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = \mathrm{KL}(q \| p) = \sum_v q(v)\,[\log q(v) - \log p(v)]

    Unbounded as the teacher's probability of a token the student may say goes to 0, and infinite,
    without a usable gradient, once it is 0: a teacher with masked tokens needs a divergence that
    mixes, such as :class:`SkewReverseKL` or :class:`GeneralizedJSD`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> ReverseKL()(student, teacher)
        tensor(0.5108)

    References:
        Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, Eq. 1.
        https://arxiv.org/abs/2306.08543
    """

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``KL(student || teacher)``."""
        return _terms(student_log_probs, teacher_log_probs).sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``q [(log q - log p) - KL(q || p)]``."""
        terms = _terms(student_log_probs, teacher_log_probs)
        return terms.sum(-1), softmax_gradient(terms, student_log_probs)


def _terms(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return kl_terms(student_log_probs, student_log_probs - teacher_log_probs)
