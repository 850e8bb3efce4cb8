import math

import numpy as np
import pytest
import torch

from lightning_kd.divergences import AdaptiveKL, ForwardKL, ReverseKL
from tests.support.toys import logit_gradient


def pair(student, teacher):
    return (torch.tensor(side, dtype=torch.float64).log() for side in (student, teacher))


def expected(student, teacher, head_weight):
    forward, reverse = ForwardKL()(student, teacher), ReverseKL()(student, teacher)
    return head_weight * forward + (1 - head_weight) * reverse


@pytest.mark.parametrize(
    ("mu", "head_weight"),
    # Gaps: 0.30 at probability 0.4, 0.10 at 0.3, 0.15 at 0.2, 0.25 at 0.1.
    [(0.1, 0.375), (0.5, 0.375), (0.75, 0.5), (0.95, 0.6875)],
)
def test_the_head_holds_at_most_mu_and_always_the_first(mu, head_weight):
    student, teacher = pair([0.1, 0.2, 0.35, 0.35], [0.4, 0.3, 0.2, 0.1])
    value = AdaptiveKL(mu)(student, teacher)
    torch.testing.assert_close(value, expected(student, teacher, head_weight), rtol=1e-14, atol=0)


def test_of_equally_likely_tokens_the_first_enters_the_head():
    """Both together would make a head of 0.9."""
    student, teacher = pair([0.1, 0.5, 0.3, 0.1], [0.4, 0.25, 0.25, 0.1])
    value = AdaptiveKL(0.7)(student, teacher)
    # Gaps: 0.30 at probability 0.4, 0.25 and 0.05 at 0.25, 0 at 0.1.
    torch.testing.assert_close(value, expected(student, teacher, 0.55 / 0.6), rtol=1e-14, atol=0)


@pytest.mark.parametrize("mu", [0.2, 0.5, 0.9])
def test_lies_between_the_kl_divergences(mu, many_log_probs):
    value = AdaptiveKL(mu)(*many_log_probs)
    forward, reverse = ForwardKL()(*many_log_probs), ReverseKL()(*many_log_probs)
    assert (torch.minimum(forward, reverse) <= value + 1e-14).all()
    assert (value <= torch.maximum(forward, reverse) + 1e-14).all()


def test_gradient_is_the_slope_at_fixed_weights(log_probs):
    student, teacher = log_probs
    forward, reverse = ForwardKL()(student, teacher), ReverseKL()(student, teacher)
    head_weight = (AdaptiveKL()(student, teacher) - reverse) / (forward - reverse)
    gradient = logit_gradient(AdaptiveKL(), student, teacher)
    step = 1e-5
    for token in range(3):
        nudge = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.tensor(token), step)
        above, below = (
            expected((student + side * nudge).log_softmax(-1), teacher, head_weight)
            for side in (1, -1)
        )
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(gradient[..., token], slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mu", [0, 1, -0.5, math.nan])
def test_mu_outside_the_open_interval_is_refused(mu):
    with pytest.raises(ValueError, match=rf"mu is {mu}, expected .* 0 and 1: use forward_kl"):
        AdaptiveKL(mu=mu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mu", [0.3, 0.5, 0.9])
def test_the_head_of_many_ties_is_that_of_a_sort(mu, dtype):
    """Bfloat16 logits tie by the dozen; the definition is sorted and summed up in float64."""
    generator = torch.Generator().manual_seed(3)
    logits = [2 * torch.randn(6, 5000, generator=generator).to(dtype) for _ in range(2)]
    student, teacher = (side.float().log_softmax(-1) for side in logits)
    found = AdaptiveKL(mu)(student, teacher)
    for row, value in enumerate(found.tolist()):
        z, u = (side[row].double().numpy() for side in logits)
        q, p = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z, u))
        order = np.argsort(-u, kind="stable")
        size = max(1, int((p[order].cumsum() <= mu).sum()))
        assert p[order[:size]].sum() <= mu
        gaps = np.abs(p - q)[order]
        share = gaps[:size].sum() / gaps.sum()
        exact = share * (p * np.log(p / q)).sum() + (1 - share) * (q * np.log(q / p)).sum()
        assert value == pytest.approx(exact, rel=2e-5)
