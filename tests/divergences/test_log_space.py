import math

import numpy as np
import pytest
import torch

from lightning_kd.divergences.log_space import (
    kl_terms,
    log_ratio_to_mixture,
    mixture_log_ratios,
    weighted,
)


def test_mixture_of_a_sure_teacher_and_an_excluding_student():
    """At 0.99 against 1e-10 the mixture is 0.495, not the 1e-5 of the mean of the logarithms."""
    teacher, student = torch.tensor([math.log(0.99)]), torch.tensor([math.log(1e-10)])
    for own, other in ((teacher, student), (student, teacher)):
        mixture = own - log_ratio_to_mixture(own, other, own_share=0.5, other_share=0.5)
        assert mixture.item() == pytest.approx(math.log(0.495), abs=1e-5)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9])
def test_mixture_of_excluded_tokens(share):
    log_probs = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log().requires_grad_()
    log_other = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64).log()
    log_ratio = log_ratio_to_mixture(log_probs, log_other, own_share=share, other_share=1 - share)
    torch.testing.assert_close(
        log_ratio[:2], torch.tensor([0.0, -math.log(share)], dtype=torch.float64)
    )
    terms = kl_terms(log_probs, log_ratio)
    assert terms[2:].tolist() == [0.0, 0.0]
    terms.sum().backward()
    assert log_probs.grad.isfinite().all()
    assert log_probs.grad[2:].tolist() == [0.0, 0.0]


def test_a_share_that_float32_rounds_to_one_stays_below_it():
    log_probs, log_other = torch.tensor([math.log(1e-20)]), torch.zeros(1)
    log_ratio = log_ratio_to_mixture(log_probs, log_other, own_share=1 - 1e-10, other_share=1e-10)
    assert log_ratio.item() == pytest.approx(math.log(1e-10), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0)])
def test_a_weight_of_0_takes_out_an_infinite_value(weight):
    assert weighted(weight, torch.tensor([torch.inf, 2.0])).tolist() == [0.0, 0.0]
    assert weighted(weight + 2, torch.tensor([torch.inf, 2.0])).tolist() == [torch.inf, 4.0]


@pytest.mark.parametrize("beta", [1e-4, 0.04, 0.3, 0.96, 1 - 1e-4])
@pytest.mark.parametrize("gap", [-40.0, -3.0, 3.0, 40.0])
def test_both_ratios_to_a_lopsided_mixture_have_the_digits_of_float32(beta, gap):
    student, teacher = torch.tensor([-45.0]), torch.tensor([-45.0 + gap])
    got = mixture_log_ratios(student, teacher, beta=beta)
    mixture = np.logaddexp(math.log(beta) - 45 + gap, math.log1p(-beta) - 45)
    expected = -45 - mixture, -45 + gap - mixture
    assert [value.item() for value in got] == pytest.approx(expected, rel=1e-5, abs=1e-6)
