import math

import pytest
import torch

from lightning_kd.divergences import (
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from tests.support.toys import logit_gradient

BETAS = [0.01, 0.1, 0.3, 0.5, 0.8, 0.99]


def test_probabilities_are_mixed_before_the_logarithm():
    """A token at 0.99 against 1e-10: log(0.495) is -0.70, the mean of the logarithms -11.5."""
    teacher = torch.tensor([0.99, 0.01], dtype=torch.float64)
    student = torch.tensor([1e-10, 1 - 1e-10], dtype=torch.float64)
    half = 0.5 * (
        0.99 * (math.log(0.99) + 0.7032)
        + 0.01 * (math.log(0.01) - math.log(0.505))
        + (1 - 1e-10) * -math.log(0.505)
    )
    assert GeneralizedJSD()(student.log(), teacher.log()).item() == pytest.approx(half, abs=1e-4)


def test_the_ends_are_exactly_the_kl_divergences(log_probs):
    for normalized in (False, True):
        low, high = GeneralizedJSD(0, normalized), GeneralizedJSD(1, normalized)
        assert torch.equal(low(*log_probs), ForwardKL()(*log_probs))
        assert torch.equal(high(*log_probs), ReverseKL()(*log_probs))
        assert torch.equal(
            logit_gradient(low, *log_probs),
            logit_gradient(ForwardKL(), *log_probs),
        )
        assert torch.equal(
            logit_gradient(high, *log_probs),
            logit_gradient(ReverseKL(), *log_probs),
        )


def test_quotients_tend_to_the_kl_divergences(log_probs):
    forward, reverse = ForwardKL()(*log_probs), ReverseKL()(*log_probs)
    toward_forward, toward_reverse = [], []
    for step in (1e-2, 1e-4, 1e-6):
        quotient = GeneralizedJSD(step)(*log_probs) / step
        toward_forward.append(((quotient - forward) / forward).abs().max())
        quotient = GeneralizedJSD(1 - step)(*log_probs) / step
        toward_reverse.append(((quotient - reverse) / reverse).abs().max())
    for errors in (toward_forward, toward_reverse):
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-3


def test_unnormalized_value_jumps_at_the_end_and_the_normalized_one_does_not(log_probs):
    forward = ForwardKL()(*log_probs)
    assert (GeneralizedJSD(1e-4)(*log_probs) < 2e-4 * forward).all()
    for near, end in ((1e-4, 0), (1 - 1.1e-4, 1)):
        value = GeneralizedJSD(near, normalized=True)(*log_probs).mean()
        limit = GeneralizedJSD(end, normalized=True)(*log_probs).mean()
        assert 0 < (value - limit).abs() / limit < 1e-2


@pytest.mark.parametrize("beta", BETAS)
def test_normalized_is_the_quotient(beta, log_probs):
    plain, normalized = GeneralizedJSD(beta), GeneralizedJSD(beta, normalized=True)
    scale = beta * (1 - beta)
    torch.testing.assert_close(
        normalized(*log_probs) * scale, plain(*log_probs), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("beta", [1e-4, 1e-3, 0.999])
def test_normalized_keeps_its_digits_in_float32_near_agreement(beta):
    generator = torch.Generator().manual_seed(5)
    teacher = 3 * torch.randn(32, 4096, generator=generator)
    student = (teacher + 0.01 * torch.randn(32, 4096, generator=generator)).log_softmax(-1)
    teacher = teacher.log_softmax(-1)
    divergence = GeneralizedJSD(beta, normalized=True)
    exact = logit_gradient(divergence, student.double(), teacher.double())
    error = logit_gradient(divergence, student, teacher).double() - exact
    assert error.norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("beta", BETAS)
def test_exchanging_the_sides_is_exchanging_the_weights(beta, many_log_probs):
    student, teacher = many_log_probs
    swapped = GeneralizedJSD(1 - beta)(teacher, student)
    torch.testing.assert_close(GeneralizedJSD(beta)(student, teacher), swapped, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_at_most_the_entropy_of_the_weights(beta, many_log_probs):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    value = GeneralizedJSD(beta)(*many_log_probs)
    assert value.max() <= bound + 1e-14
    assert value.max() > 0.9 * bound
    assert bound <= math.log(2)


@pytest.mark.parametrize("beta", BETAS)
def test_is_made_up_of_the_two_skewed_kl_divergences(beta, many_log_probs):
    parts = beta * SkewKL(beta)(*many_log_probs)
    parts += (1 - beta) * SkewReverseKL(1 - beta)(*many_log_probs)
    torch.testing.assert_close(GeneralizedJSD(beta)(*many_log_probs), parts, rtol=0, atol=1e-12)


def test_total_variation_bounds_the_symmetric_divergence(many_log_probs):
    value = GeneralizedJSD()(*many_log_probs)
    distance = TotalVariation()(*many_log_probs)
    assert (distance.square() / 2 <= value + 1e-14).all()
    assert (value <= math.log(2) * distance + 1e-14).all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_the_unit_interval_is_refused(beta):
    with pytest.raises(ValueError, match=rf"beta is {beta}, expected .* in \[0, 1\]: use 0"):
        GeneralizedJSD(beta=beta)


@pytest.mark.parametrize("beta", [1e-300, 1e-12, 1 - 1e-12])
def test_a_beta_next_to_an_end_stays_finite(beta, log_probs):
    student, teacher = (side.float() for side in log_probs)
    assert GeneralizedJSD(beta)(student, teacher).abs().max() < 1e-6
    assert logit_gradient(GeneralizedJSD(beta), student, teacher).abs().max() < 1e-6
