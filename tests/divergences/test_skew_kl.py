import math

import pytest
import torch

from lightning_kd.divergences import ForwardKL, ReverseKL, SkewKL, SkewReverseKL

PAIRS = [(SkewKL, ForwardKL), (SkewReverseKL, ReverseKL)]


@pytest.mark.parametrize(("skewed", "limit"), PAIRS)
def test_tends_to_the_kl_divergence(skewed, limit, log_probs):
    expected = limit()(*log_probs)
    errors = [
        ((skewed(alpha)(*log_probs) - expected) / expected).abs().max()
        for alpha in (1e-2, 1e-4, 1e-8)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("skewed", "limit"), PAIRS)
def test_bounds(skewed, limit, alpha, many_log_probs):
    value = skewed(alpha)(*many_log_probs)
    assert value.max() <= -math.log(alpha) + 1e-14
    assert value.max() > -0.9 * math.log(alpha)
    assert (value <= (1 - alpha) * limit()(*many_log_probs) + 1e-14).all()


def test_exchanging_the_sides_is_exchanging_the_classes(log_probs):
    student, teacher = log_probs
    swapped = SkewReverseKL(0.3)(teacher, student)
    torch.testing.assert_close(SkewKL(0.3)(student, teacher), swapped, rtol=0, atol=1e-14)


def test_the_default_mixes_in_a_tenth(log_probs):
    assert torch.equal(SkewKL()(*log_probs), SkewKL(0.1)(*log_probs))
    assert torch.equal(SkewReverseKL()(*log_probs), SkewReverseKL(0.1)(*log_probs))


@pytest.mark.parametrize("alpha", [-0.1, 0, 1, math.nan])
@pytest.mark.parametrize("skewed", [SkewKL, SkewReverseKL])
def test_alpha_outside_the_open_interval_is_refused(skewed, alpha):
    with pytest.raises(ValueError, match=rf"alpha is {alpha}, expected .*: use forward_kl or"):
        skewed(alpha=alpha)
