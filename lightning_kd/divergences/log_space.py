"""What the divergences share: KL terms, mixtures and the softmax gradient, all in log space."""

import math

import torch
from torch import Tensor

LIMIT_WIDTH = 1e-4
"""Within this distance of a removable singularity a divergence is its own limit.

Dividing by a parameter of 1e-6 costs float32 about 1 % of the value, while the limit is off by
about the parameter itself: 1e-4 is where the two errors meet.
"""


def kl_terms(log_probs: Tensor, log_reference: Tensor) -> Tensor:
    r"""The summands :math:`a_v (\log a_v - \log b_v)` of a KL divergence, ``(..., V)``.

    A token that ``log_probs`` excludes contributes 0 whatever the reference says, in the value and
    in the gradient: the ratio is masked before the product, since ``0 * inf`` is NaN in both.
    """
    probs = log_probs.exp()
    return probs * (log_probs - log_reference).masked_fill(probs == 0, 0.0)


def log_mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    r"""Log-probabilities of the mixture :math:`s\,a + (1 - s)\,b`, for a share ``0 < s < 1``.

    The probabilities are mixed, not their logarithms. The share stays a Python float: as a bfloat16
    tensor 0.999 would be 1.
    """
    # logaddexp(-inf, -inf) has a NaN gradient; one finite operand is enough to avoid it.
    floored = (log_second + math.log1p(-share)).clamp_min(torch.finfo(log_second.dtype).min)
    return torch.logaddexp(log_first + math.log(share), floored)


def softmax_gradient(slope: Tensor, log_probs: Tensor) -> Tensor:
    r"""Gradient in the logits, :math:`g_i - q_i \sum_v g_v`, of one in the log-probabilities."""
    return slope - log_probs.exp() * slope.sum(-1, keepdim=True)
