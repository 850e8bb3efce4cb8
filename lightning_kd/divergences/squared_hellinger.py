"""The squared Hellinger distance."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import softmax_gradient


@register_divergence("squared_hellinger")
class SquaredHellinger(Divergence):
    r"""Squared Hellinger distance, in the convention that reaches 1, not 2.

    With :math:`q` the student and :math:`p` the teacher:

    .. math:: D = 1 - \sum_v \sqrt{p(v)\,q(v)}
              = \tfrac{1}{2} \sum_v \bigl(\sqrt{p(v)} - \sqrt{q(v)}\bigr)^2

    Symmetric, in [0, 1], and finite also where a side excludes tokens. With :math:`D_\mathrm{TV}`
    the total variation, :math:`D \le D_\mathrm{TV} \le \sqrt{D (2 - D)}`. Four times this is
    ``AlphaBeta(0.5, 0.5)``. The second form is evaluated: it does not cancel near agreement.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> SquaredHellinger()(student, teacher)
        tensor(0.1056)

    References:
        Liese and Vajda, *On Divergences and Informations in Statistics and Information Theory*,
        IEEE Transactions on Information Theory 52(10), 2006.
        https://doi.org/10.1109/TIT.2006.881731
    """

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``sum (sqrt(p) - sqrt(q))^2 / 2``."""
        difference = (teacher_log_probs / 2).exp() - (student_log_probs / 2).exp()
        return 0.5 * difference.square().sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``sqrt(q) (sqrt(q) - sqrt(p)) / 2``, centered."""
        root = (student_log_probs / 2).exp()
        difference = root - (teacher_log_probs / 2).exp()
        value = 0.5 * difference.square().sum(-1)
        return value, softmax_gradient(0.5 * root * difference, student_log_probs)
