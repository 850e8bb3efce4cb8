"""The adaptive KL divergence: forward KL for the head of the teacher, reverse KL for the tail."""

from torch import Tensor

from lightning_kd.divergences.base import Divergence, register_divergence
from lightning_kd.divergences.forward_kl import ForwardKL
from lightning_kd.divergences.heads import head_of
from lightning_kd.divergences.log_space import weighted
from lightning_kd.divergences.reverse_kl import ReverseKL


@register_divergence("adaptive_kl")
class AdaptiveKL(Divergence):
    r"""Adaptive KL: forward and reverse KL, weighted by where the student is further off.

    With :math:`q` the student, :math:`p` the teacher and :math:`H` the head of the teacher:

    .. math:: D = g\,\mathrm{KL}(p \| q) + (1 - g)\,\mathrm{KL}(q \| p), \qquad
              g = \frac{\sum_{v \in H} |p(v) - q(v)|}{\sum_v |p(v) - q(v)|}

    The head is the longest prefix of the tokens, sorted by the teacher's probability, whose total
    is at most ``mu``; the most likely token always belongs to it. Of equally likely tokens (which
    bfloat16 logits have many of) those with lower ids come first, as in a stable sort. Lies between
    the two KL divergences and, like the reverse KL, is infinite where the teacher excludes a token
    that the student may say.

    The weight is a constant to the gradient: this is the gradient of the formula at a fixed
    :math:`g`, not the slope of the value.

    Args:
        mu: Largest probability of the head, strictly between 0 and 1.

    Raises:
        ValueError: If ``mu`` is not strictly between 0 and 1.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.2, 0.4, 0.4], [0.6, 0.3, 0.1]]).log()
        >>> AdaptiveKL(mu=0.5)(student, teacher)
        tensor(0.4421)

    References:
        Wu et al., *Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
        Language Models*, COLING 2025. https://arxiv.org/abs/2404.02657
    """

    _forward, _reverse = ForwardKL(), ReverseKL()

    def __init__(self, mu: float = 0.5) -> None:
        if not 0 < mu < 1:
            raise ValueError(
                f"mu is {mu}, expected a probability strictly between 0 and 1: use forward_kl or "
                "reverse_kl for one side alone"
            )
        self.mu = mu

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The KL divergences, each times its weight."""
        head, tail = self._weights(student_log_probs, teacher_log_probs)
        forward = self._forward.value(student_log_probs, teacher_log_probs)
        reverse = self._reverse.value(student_log_probs, teacher_log_probs)
        return weighted(head, forward) + weighted(tail, reverse)

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Combine those of the two KL divergences, each times its weight."""
        head, tail = self._weights(student_log_probs, teacher_log_probs)
        forward = self._forward.value_and_logit_gradient(student_log_probs, teacher_log_probs)
        reverse = self._reverse.value_and_logit_gradient(student_log_probs, teacher_log_probs)
        value = weighted(head, forward[0]) + weighted(tail, reverse[0])
        return value, head.unsqueeze(-1) * forward[1] + tail.unsqueeze(-1) * reverse[1]

    def _weights(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        in_head = head_of(teacher_log_probs, self.mu)
        gap = (teacher_log_probs.exp() - student_log_probs.detach().exp()).abs()
        head = gap.masked_fill(~in_head, 0.0).sum(-1)
        tail = gap.masked_fill(in_head, 0.0).sum(-1)
        total = head + tail
        # At agreement both KL divergences are 0, so any finite weight serves; 0 / 0 does not.
        total = total.masked_fill(total == 0, 1.0)
        return head / total, tail / total
