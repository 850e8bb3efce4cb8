import math

import pytest
import torch

from lightning_kd.divergences import AlphaBeta, ForwardKL, ReverseKL, SquaredHellinger
from tests.support.toys import logit_gradient


@pytest.mark.parametrize(
    ("exponents", "limit"),
    [((1, 0), ForwardKL()), ((0, 1), ReverseKL())],
    ids=["forward", "reverse"],
)
def test_corners_are_the_kl_divergences(exponents, limit, log_probs):
    corner = AlphaBeta(*exponents)
    torch.testing.assert_close(corner(*log_probs), limit(*log_probs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logit_gradient(corner, *log_probs),
        logit_gradient(limit, *log_probs),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize(
    ("toward", "limit"),
    [
        (lambda step: (1, step), (1, 0)),
        (lambda step: (step, 1), (0, 1)),
        (lambda step: (0.6, step), (0.6, 0)),
        (lambda step: (step, 0.6), (0, 0.6)),
        (lambda step: (0.5 + step, -0.5), (0.5, -0.5)),
        (lambda step: (step - 0.4, 0.4), (-0.4, 0.4)),
        (lambda step: (step, step), (0, 0)),
    ],
    ids=lambda part: str(part) if isinstance(part, tuple) else "",
)
def test_limits_are_approached_in_proportion_to_the_distance(toward, limit, log_probs):
    expected = AlphaBeta(*limit)(*log_probs)
    errors = []
    for step in (1e-2, 1e-3, 2e-4):
        value = AlphaBeta(*toward(step))(*log_probs)
        errors.append(((value - expected).abs() / expected).max().item())
    assert 6 < errors[0] / errors[1] < 14
    assert 4 < errors[1] / errors[2] < 6
    assert errors[2] < 1e-2


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        ((0.6, 1e-5), (0.6, 0)),
        ((-1e-5, 0.6), (0, 0.6)),
        ((0.5 + 1e-5, -0.5), (0.5 + 1e-5, -0.5 - 1e-5)),
        ((1e-5, 2e-5), (0, 0)),
        ((0.1 + 0.2, -0.3 - 1e-16), (0.3, -0.3)),
    ],
)
def test_next_to_a_limit_it_is_the_limit(near, limit, log_probs):
    value, expected = AlphaBeta(*near), AlphaBeta(*limit)
    torch.testing.assert_close(value(*log_probs), expected(*log_probs), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        logit_gradient(value, *log_probs),
        logit_gradient(expected, *log_probs),
        rtol=1e-13,
        atol=1e-13,
    )


def test_halves_are_four_times_the_squared_hellinger_distance(log_probs):
    value = AlphaBeta(0.5, 0.5)(*log_probs)
    torch.testing.assert_close(value, 4 * SquaredHellinger()(*log_probs), rtol=1e-12, atol=0)


def test_ones_are_half_the_squared_euclidean_distance(log_probs):
    student, teacher = (side.exp() for side in log_probs)
    expected = (student - teacher).square().sum(-1) / 2
    torch.testing.assert_close(AlphaBeta(1, 1)(*log_probs), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [-0.5, 0.2, 0.7, 1.5])
def test_exponents_that_sum_to_one_are_amaris_divergence(alpha, log_probs):
    student, teacher = (side.exp() for side in log_probs)
    affinity = (teacher**alpha * student ** (1 - alpha)).sum(-1)
    expected = (1 - affinity) / (alpha * (1 - alpha))
    value = AlphaBeta(alpha, 1 - alpha)(*log_probs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponents", [(0.2, 0.7), (0.6, 0), (0, 0.6), (0.5, -0.5), (0, 0)])
def test_exchanging_the_sides_is_exchanging_the_exponents(exponents, log_probs):
    student, teacher = log_probs
    swapped = AlphaBeta(*reversed(exponents))(teacher, student)
    value = AlphaBeta(*exponents)(student, teacher)
    torch.testing.assert_close(value, swapped, rtol=1e-12, atol=0)


def test_defaults_are_those_of_the_paper():
    assert repr(AlphaBeta()) == "AlphaBeta(alpha=0.2, beta=0.7)"


@pytest.mark.parametrize("exponents", [(math.nan, 0.5), (0.5, math.inf)])
def test_exponents_that_are_not_finite_are_refused(exponents):
    with pytest.raises(ValueError, match=r"nan|inf.*, expected two finite exponents"):
        AlphaBeta(*exponents)


def test_a_negative_sum_is_refused():
    with pytest.raises(ValueError, match=r"alpha \+ beta is -0\.25, expected .* raise one"):
        AlphaBeta(0.5, -0.75)
