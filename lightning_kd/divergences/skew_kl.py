"""The skewed KL divergences of DistiLLM: one side is mixed into the other before the KL."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import kl_terms, log_ratio_to_mixture, softmax_gradient


@register_divergence("skew_kl")
class SkewKL(Divergence):
    r"""Skewed forward KL: the teacher against a student into whom a little teacher is mixed.

    With :math:`q` the student, :math:`p` the teacher and :math:`m = \alpha p + (1 - \alpha) q`:

    .. math:: D = \mathrm{KL}(p \| m)

    ``alpha`` is the small share of the side that stands left in the KL: towards 0 this becomes the
    forward KL, while 0.9 mixes the student almost out of it. At most :math:`-\log\alpha`, and at
    most :math:`1 - \alpha` times the forward KL. Finite, also where a side excludes tokens.

    Args:
        alpha: Share of the teacher in the mixture, strictly between 0 and 1.

    Raises:
        ValueError: If ``alpha`` is not strictly between 0 and 1.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> SkewKL(alpha=0.1)(student, teacher)
        tensor(0.3071)

    References:
        Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*,
        ICML 2024, Section 3.1. https://arxiv.org/abs/2402.03898
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = _checked_share(alpha)

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``KL(p || m)``."""
        log_ratio = log_ratio_to_mixture(
            teacher_log_probs, student_log_probs, own_share=self.alpha, other_share=1 - self.alpha
        )
        return kl_terms(teacher_log_probs, log_ratio).sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``-(1 - alpha) [q p / m - q sum(q p / m)]``."""
        log_ratio = log_ratio_to_mixture(
            student_log_probs, teacher_log_probs, own_share=1 - self.alpha, other_share=self.alpha
        )
        slope = (self.alpha - 1) * (teacher_log_probs + log_ratio).exp()
        value = self.value(student_log_probs, teacher_log_probs)
        return value, softmax_gradient(slope, student_log_probs)


@register_divergence("skew_reverse_kl")
class SkewReverseKL(Divergence):
    r"""Skewed reverse KL: the student against a teacher into whom a little student is mixed.

    With :math:`q` the student, :math:`p` the teacher and :math:`m = (1 - \alpha) p + \alpha q`:

    .. math:: D = \mathrm{KL}(q \| m)

    ``alpha`` is the small share of the side that stands left in the KL: towards 0 this becomes the
    reverse KL. At most :math:`-\log\alpha`, and at most :math:`1 - \alpha` times the reverse KL.
    Finite, also where a side excludes tokens. The gradient flows through the student in the mixture
    too. With :class:`SkewKL` it makes up the generalized Jensen-Shannon divergence: ``beta`` times
    ``SkewKL(beta)`` plus ``1 - beta`` times ``SkewReverseKL(1 - beta)``.

    Args:
        alpha: Share of the student in the mixture, strictly between 0 and 1.

    Raises:
        ValueError: If ``alpha`` is not strictly between 0 and 1.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> SkewReverseKL(alpha=0.1)(student, teacher)
        tensor(0.3653)

    References:
        Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*,
        ICML 2024, Section 3.1. https://arxiv.org/abs/2402.03898
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = _checked_share(alpha)

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``KL(q || m)``."""
        log_ratio = self._log_ratio(student_log_probs, teacher_log_probs)
        return kl_terms(student_log_probs, log_ratio).sum(-1)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``q h - q sum(q h)`` with ``h = log q - log m - alpha q / m``."""
        log_ratio = self._log_ratio(student_log_probs, teacher_log_probs)
        terms = kl_terms(student_log_probs, log_ratio)
        slope = terms - self.alpha * (student_log_probs + log_ratio).exp()
        return terms.sum(-1), softmax_gradient(slope, student_log_probs)

    def _log_ratio(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return log_ratio_to_mixture(
            student_log_probs, teacher_log_probs, own_share=self.alpha, other_share=1 - self.alpha
        )


def _checked_share(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha is {alpha}, expected a share strictly between 0 and 1, and a small one (0.1 in "
            "the paper): use forward_kl or reverse_kl for 0"
        )
    return alpha
