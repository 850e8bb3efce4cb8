"""Shared parts of divergences in log space: KL terms, mixtures, the softmax gradient."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LIMIT_WIDTH = 1e-4
"""Within this distance of a removable singularity a divergence is its own limit.

The limit is off by about the distance; the quotient loses about 1e-7 of the value, in float32, over
the distance, and is 0 / 0 in the end.
"""


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:
    """``weight * value``, where a weight of 0 leaves 0 of an infinite value.

    Example:
        >>> weighted(torch.tensor([0.0, 0.5]), torch.tensor([torch.inf, 3.0]))
        tensor([0.0000, 1.5000])
    """
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight != 0 else torch.zeros_like(value)


def expectation(weights: Tensor, log_probs: Tensor) -> Tensor:
    """``sum exp(weights) log_probs`` over the last axis, where 0 times minus infinity is 0."""
    probabilities = weights.exp()
    # Masked before the product, whose gradient is NaN as well.
    return (probabilities * log_probs.masked_fill(probabilities == 0, 0.0)).sum(-1)


def kl_terms(log_probs: Tensor, log_ratio: Tensor) -> Tensor:
    r"""The summands :math:`a_v \log (a_v / b_v)` of a KL divergence, shape ``(..., V)``.

    A token that ``log_probs`` excludes contributes 0 whatever the ratio, in the value and in the
    gradient: the ratio is masked before the product, since ``0 * inf`` is NaN in both.
    """
    probs = log_probs.exp()
    return probs * log_ratio.masked_fill(probs == 0, 0.0)


def log_ratio_to_mixture(
    log_probs: Tensor, log_other: Tensor, *, own_share: float, other_share: float
) -> Tensor:
    r"""Evaluate :math:`\log (a / m)` with the mixture :math:`m = s\,a + t\,b` of two shares.

    The probabilities are mixed, not their logarithms. The mixture is taken relative to
    ``log_probs`` right away: near agreement, and with a small share, the difference of two
    log-probabilities of -10 would be all round-off. The shares stay Python floats: as a bfloat16
    tensor 0.999 would be 1.
    """
    # -inf - -inf is NaN; one finite operand avoids it, and kl_terms drops the token anyway.
    floored = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
    other = log_other - floored + math.log(other_share)
    return -torch.logaddexp(other, other.new_full((), math.log(own_share)))


def mixture_log_ratios(
    student_log_probs: Tensor, teacher_log_probs: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    r"""Both sides against :math:`m = \beta p + (1 - \beta) q`: :math:`\log (q/m), \log (p/m)`.

    The same as two calls of :func:`log_ratio_to_mixture`, for half of the arithmetic, and exactly 0
    at agreement. Without a gradient: its automatic one is wrong there. Finite numbers stand for
    infinite ones, where the side's own probability is 0.
    """
    if min(beta, 1 - beta) < 0.05:
        # Below, log1p of nearly -1 would lose as many digits as the smaller share has zeros.
        return (
            log_ratio_to_mixture(
                student_log_probs, teacher_log_probs, own_share=1 - beta, other_share=beta
            ),
            log_ratio_to_mixture(
                teacher_log_probs, student_log_probs, own_share=beta, other_share=1 - beta
            ),
        )
    floor = -1e30
    gap = teacher_log_probs.clamp_min(floor).sub_(student_log_probs.clamp_min(floor))
    # log(m / q) = log1p(beta expm1(gap)) overflows for a large gap, log(m / p) for a small one; with
    # the larger side taken out, what is left over has an exponent that is never positive.
    rest = expm1_(gap.abs().neg_())
    # The share of the smaller side, by sign: a torch.where costs more than all of the logarithms.
    share = gap.sign().mul_(0.5 - beta).add_(0.5)
    rest = rest.mul_(share).log1p_()
    to_student = gap.clamp_min(0).add_(rest).neg_()
    return to_student, gap.clamp_max_(0).sub_(rest)


def expm1_(x: Tensor) -> Tensor:
    r"""Return :math:`e^x - 1` without cancellation near 0; it may take the place of ``x``.

    In compiled code it is :math:`\tanh(x / 2) (e^x + 1)`: what PyTorch makes of ``expm1`` on a CPU is a
    difference, which is 0 for an ``x`` of 1e-8.

    Example:
        >>> expm1_(torch.tensor([-1e-8, 1.0]))
        tensor([-1.0000e-08,  1.7183e+00])
    """
    if torch.compiler.is_compiling():
        return (x / 2).tanh() * (x.exp() + 1)
    return x.expm1_()


def value_and_gradient(
    function: Callable[[Tensor], Tensor], at: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a function, and differentiate the sum of its values automatically.

    Returns:
        The values, and the gradient in ``at``; None where the values do not depend on it.
    """
    if torch.compiler.is_compiling():  # which does not trace autograd's own functions
        values, pull_back, *_ = torch.func.vjp(function, at)
        (gradient,) = pull_back(torch.ones_like(values))
        return values, gradient
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        values = function(leaf)
        if not values.requires_grad:
            return values, None
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def softmax_gradient(slope: Tensor, log_probs: Tensor) -> Tensor:
    r"""Gradient in the logits, :math:`g_i - q_i \sum_v g_v`, of one in the log-probabilities."""
    return slope - log_probs.exp() * slope.sum(-1, keepdim=True)
