"""The loss of drafts: minus the logarithm of the probability that a draft is accepted."""

import torch
from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.log_space import softmax_gradient

_FAR = 0.5
"""Distance from which on the sum is computed itself."""


@register_divergence("negative_log_acceptance")
class NegativeLogAcceptance(Divergence):
    r"""Minus the logarithm of the share of drafted tokens that the teacher accepts (the LK loss).

    With :math:`q` the student, which drafts, and :math:`p` the teacher, which verifies:

    .. math:: D = -\log \sum_v \min\bigl(p(v), q(v)\bigr) = -\log\bigl(1 - TV(p, q)\bigr)

    The sum is the probability that speculative sampling accepts a token that the student has drafted.
    The gradient is that of the total variation divided by the acceptance: where next to nothing is
    accepted, and the total variation is flat, it still pulls. At least the total variation, and
    unbounded; infinite where the two have no token in common.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> NegativeLogAcceptance()(student, teacher)
        tensor(0.5108)

    References:
        Samarin et al., *LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding*,
        2026. https://arxiv.org/abs/2602.23881; the acceptance is that of Leviathan et al., *Fast
        Inference from Transformers via Speculative Decoding*, ICML 2023, Corollary 3.6.
        https://arxiv.org/abs/2211.17192
    """

    order = 1

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``-log sum min(p, q)``."""
        distance = 0.5 * (teacher_log_probs.exp() - student_log_probs.exp()).abs().sum(-1)
        # Near agreement the sum is 1 up to rounding, and the distance is exact; far from it, the
        # distance is 1 up to rounding, and the logarithm of the sum is exact.
        near = -torch.log1p(-distance.clamp_max(_FAR))
        return torch.where(
            distance < _FAR, near, -_log_shared(student_log_probs, teacher_log_probs)
        )

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value and ``-[u - q sum(u)] / sum min(p, q)``, with ``u = q`` where ``q < p``, else 0."""
        value = self.value(student_log_probs, teacher_log_probs)
        # By the logarithms: where both probabilities are 0 in float32, one is still the smaller. Its
        # token is in the sum, so that its share is 1 at most; that of another need not be, and the
        # sum alone may be less than float32 holds.
        absent = (student_log_probs > teacher_log_probs) | (student_log_probs == -torch.inf)
        share = (student_log_probs + value.unsqueeze(-1)).masked_fill(absent, -torch.inf).exp()
        smaller = torch.where(student_log_probs < teacher_log_probs, share, 0.5 * share)
        return value, softmax_gradient(-smaller, student_log_probs)


def _log_shared(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """``log sum min(p, q)``, minus infinity without a NaN in the gradient where nothing is shared."""
    smaller = torch.minimum(student_log_probs, teacher_log_probs)
    nothing = (smaller == -torch.inf).all(-1)
    total = smaller.clamp_min(torch.finfo(smaller.dtype).min).logsumexp(-1)
    return total.masked_fill(nothing, -torch.inf)
