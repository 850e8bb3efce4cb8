import math

import pytest
import torch

from lightning_kd.divergences import AdaptiveKL, ForwardKL, ReverseKL
from tests.toys import logit_gradient


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


def test_equally_likely_tokens_enter_the_head_together():
    """Whichever of the two tied tokens a sort puts first, the value is the same."""
    student, teacher = pair([0.1, 0.5, 0.3, 0.1], [0.4, 0.25, 0.25, 0.1])
    value = AdaptiveKL(0.7)(student, teacher)
    torch.testing.assert_close(value, expected(student, teacher, 1.0), rtol=1e-14, atol=0)
    assert torch.equal(value, AdaptiveKL(0.7)(student[[0, 2, 1, 3]], teacher[[0, 2, 1, 3]]))


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
