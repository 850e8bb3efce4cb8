"""One suite for whatever is registered: a new divergence needs a reference, and nothing else here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd.divergences import Divergence, available_divergences, make_divergence
from tests.support.divergence_references import REFERENCES
from tests.support.toys import logit_gradient

SETTINGS = {
    "adaptive_kl": [{"mu": 0.2}, {"mu": 0.9}],
    "alpha_beta": [
        {"alpha": 1, "beta": 0},
        {"alpha": 0, "beta": 1},
        {"alpha": 0.6, "beta": 0},
        {"alpha": 0, "beta": 0.6},
        {"alpha": 0, "beta": 0},
        {"alpha": 0.5, "beta": -0.5},
        {"alpha": -0.4, "beta": 0.4},
        {"alpha": 0.5, "beta": 0.5},
        {"alpha": 1, "beta": 1},
        {"alpha": 1.5, "beta": -0.5},
        {"alpha": -0.5, "beta": 1.5},
    ],
    "generalized_jsd": [
        {"beta": 0},
        {"beta": 1},
        {"beta": 0.1},
        {"beta": 0.9},
        {"beta": 0.3, "normalized": True},
        {"beta": 1e-3, "normalized": True},
        {"beta": 1 - 1e-3, "normalized": True},
        {"beta": 5e-5, "normalized": True},
        {"beta": 1 - 5e-5, "normalized": True},
    ],
    "skew_kl": [{"alpha": 0.01}, {"alpha": 0.6}],
    "skew_reverse_kl": [{"alpha": 0.01}, {"alpha": 0.6}],
}
REGISTERED = available_divergences()
CASES = [(name, choice) for name in REGISTERED for choice in [{}, *SETTINGS.get(name, [])]]
every_case = pytest.mark.parametrize(
    ("name", "parameters"), CASES, ids=lambda part: part if isinstance(part, str) else repr(part)
)


def reference(name, parameters, student, teacher):
    with np.errstate(all="ignore"):
        return REFERENCES[name](teacher.exp().numpy(), student.exp().numpy(), **parameters)


def gradient_through_logits(divergence, student_logits, teacher):
    leaf = student_logits.clone().requires_grad_()
    divergence(leaf.log_softmax(-1), teacher).sum().backward()
    return leaf.grad


def assert_close(actual, expected, tolerance=1e-12):
    """Relative to the largest entry: centering a gradient rounds on that scale."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def test_everything_registered_has_a_reference():
    assert set(REGISTERED) == set(REFERENCES)
    assert set(SETTINGS) <= set(REFERENCES)


@every_case
def test_value_matches_the_formula(name, parameters, log_probs):
    student, teacher = log_probs
    value = make_divergence(name, **parameters)(student, teacher)
    expected = torch.from_numpy(reference(name, parameters, student, teacher))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert (value > 1e-3).all()


@every_case
def test_the_instance_knows_its_name(name, parameters):
    assert make_divergence(name, **parameters).name == name


@every_case
def test_agreement_is_zero_with_zero_gradient(name, parameters, logits, log_probs):
    student, _ = log_probs
    divergence = make_divergence(name, **parameters)
    assert divergence(student, student).abs().max() <= 1e-15
    assert logit_gradient(divergence, student, student).abs().max() <= 1e-15
    assert gradient_through_logits(divergence, logits[0], student).abs().max() <= 1e-15


@every_case
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), sharpness=st.floats(0, 8), distance=st.floats(0, 8))
def test_value_is_not_negative(name, parameters, seed, sharpness, distance):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    teacher = sharpness * draws[0]
    student = teacher + distance * draws[1]
    value = make_divergence(name, **parameters)(student.log_softmax(-1), teacher.log_softmax(-1))
    assert value.isfinite().all()
    assert value.min() >= -1e-14


@every_case
def test_closed_form_gradient_equals_autograd(name, parameters, logits, log_probs):
    divergence = make_divergence(name, **parameters)
    student, teacher = log_probs
    value, closed = divergence.value_and_logit_gradient(student, teacher)
    assert type(divergence).value_and_logit_gradient is not Divergence.value_and_logit_gradient
    assert_close(value, divergence(student, teacher))
    assert_close(closed, gradient_through_logits(divergence, logits[0], teacher))
    assert_close(closed, Divergence.value_and_logit_gradient(divergence, student, teacher)[1])
    assert closed.abs().max() > 1e-3


@every_case
def test_gradient_sums_to_zero_over_the_vocabulary(name, parameters, log_probs):
    gradient = logit_gradient(make_divergence(name, **parameters), *log_probs)
    assert gradient.sum(-1).abs().max() <= 1e-14 * max(1.0, gradient.abs().max())


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The adaptive KL holds its weights constant, so that its slope is not its gradient by design;
    # its own test takes the slope at fixed weights.
    [case for case in CASES if case[0] != "adaptive_kl"],
    ids=lambda part: part if isinstance(part, str) else repr(part),
)
def test_gradient_equals_finite_differences(name, parameters, logits):
    divergence = make_divergence(name, **parameters)
    student_logits = logits[0][0, :3, :5].clone().requires_grad_()
    teacher = logits[1][0, :3, :5].log_softmax(-1)
    assert torch.autograd.gradcheck(
        lambda z: divergence(z.log_softmax(-1), teacher), student_logits
    )


@every_case
def test_teacher_receives_no_gradient(name, parameters, log_probs):
    student, teacher = (side.clone().requires_grad_() for side in log_probs)
    make_divergence(name, **parameters)(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@every_case
def test_shifting_the_logits_changes_nothing(name, parameters, logits, log_probs):
    divergence = make_divergence(name, **parameters)
    shift = torch.linspace(-30, 30, logits[0][..., :1].numel(), dtype=torch.float64)
    shift = shift.view_as(logits[0][..., :1])
    student, teacher = (logits[0] + shift).log_softmax(-1), (logits[1] - shift).log_softmax(-1)
    assert_close(divergence(student, teacher), divergence(*log_probs))
    assert_close(
        logit_gradient(divergence, student, teacher),
        logit_gradient(divergence, *log_probs),
    )


@every_case
def test_permuting_the_vocabulary_permutes_the_gradient(name, parameters, log_probs):
    divergence = make_divergence(name, **parameters)
    student, teacher = log_probs
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(3))
    permuted = student[..., order], teacher[..., order]
    assert_close(divergence(*permuted), divergence(student, teacher))
    assert_close(
        logit_gradient(divergence, *permuted),
        logit_gradient(divergence, student, teacher)[..., order],
    )


def far_apart():
    """Logit gaps of 200: opposite one-hot sides, one-hot against uniform, agreement."""
    peak, other = torch.zeros(11), torch.zeros(11)
    peak[2], other[7] = 200.0, 200.0
    uniform = torch.zeros(11)
    student_logits = torch.stack([peak, peak, uniform, peak])
    teacher_logits = torch.stack([other, uniform, peak, peak])
    return student_logits, teacher_logits.log_softmax(-1)


@every_case
def test_logit_gaps_of_200_stay_finite_in_float32(name, parameters):
    divergence = make_divergence(name, **parameters)
    student_logits, teacher = far_apart()
    student = student_logits.log_softmax(-1)
    value = divergence(student, teacher)
    exact = divergence(student.double(), teacher.double())
    assert exact.isfinite().all()
    # Negative exponents reach exp(100) and more here, beyond the range of float32.
    in_range = exact < torch.finfo(torch.float32).max
    assert in_range.all() or min(parameters.values()) < 0
    torch.testing.assert_close(value[in_range].double(), exact[in_range], rtol=1e-5, atol=1e-6)
    assert (value[~in_range] == math.inf).all()
    assert logit_gradient(divergence, student, teacher)[in_range].isfinite().all()
    assert gradient_through_logits(divergence, student_logits, teacher)[in_range].isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_that_excludes_tokens(name, parameters, dtype, logits):
    divergence = make_divergence(name, **parameters)
    student_logits, teacher_logits = (side.to(dtype) for side in logits)
    student = student_logits.log_softmax(-1)
    teacher = teacher_logits.index_fill(-1, torch.tensor([0, 4, 5]), -math.inf).log_softmax(-1)
    value = divergence(student, teacher)
    expected = torch.from_numpy(reference(name, parameters, student.double(), teacher.double()))
    if not expected.isfinite().all():
        assert (value == math.inf).all()
        return
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    closed = logit_gradient(divergence, student, teacher)
    assert closed.isfinite().all()
    assert_close(closed, gradient_through_logits(divergence, student_logits, teacher), tolerance)


@every_case
def test_a_token_that_both_sides_exclude_is_as_good_as_absent(name, parameters, logits):
    divergence = make_divergence(name, **parameters)
    kept, gone = torch.tensor([1, 2, 3, 6, 7, 8, 9, 10]), torch.tensor([0, 4, 5])
    masked_logits, masked_teacher = (side.index_fill(-1, gone, -math.inf) for side in logits)
    masked = masked_logits.log_softmax(-1), masked_teacher.log_softmax(-1)
    small = tuple(side[..., kept].log_softmax(-1) for side in logits)
    assert_close(divergence(*masked), divergence(*small))
    expected = torch.zeros_like(logits[0]).index_copy(-1, kept, logit_gradient(divergence, *small))
    assert_close(logit_gradient(divergence, *masked), expected)
    assert_close(gradient_through_logits(divergence, masked_logits, masked[1]), expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_evaluated_in_float32(name, parameters, dtype, log_probs):
    divergence = make_divergence(name, **parameters)
    student, teacher = (side.to(dtype) for side in log_probs)
    value = divergence(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence(student.float(), teacher.float()))


@every_case
def test_every_leading_shape_is_kept(name, parameters, log_probs):
    divergence = make_divergence(name, **parameters)
    student, teacher = log_probs
    value = divergence(student, teacher)
    assert value.shape == (4, 16)
    assert value.dtype == torch.float64
    assert_close(divergence(student[1, 2], teacher[1, 2]), value[1, 2])
    assert divergence(student[:0], teacher[:0]).shape == (0, 16)


@every_case
def test_different_shapes_are_refused(name, parameters, log_probs):
    student, teacher = log_probs
    with pytest.raises(ValueError, match=r"\(4, 16, 11\).*\(4, 16, 10\).*same vocabulary"):
        make_divergence(name, **parameters)(student, teacher[..., :-1])


ORDERS = {
    **{(name, ()): 2 for name in available_divergences()},
    ("negative_log_acceptance", ()): 1,
    ("total_variation", ()): 1,
    **{
        ("alpha_beta", (("alpha", a), ("beta", b))): 2
        for a, b in [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, -1.0), (1.0, 0.0), (0.0, 1.0)]
    },
    **{("generalized_jsd", (("beta", beta),)): 2 for beta in (0.0, 0.1, 0.9, 1.0)},
    ("generalized_jsd", (("beta", 0.1), ("normalized", True))): 2,
    **{("adaptive_kl", (("mu", mu),)): 2 for mu in (0.2, 0.8)},
}


@pytest.mark.parametrize(("name", "parameters"), ORDERS)
def test_the_order_is_the_power_with_which_a_softened_gradient_shrinks(name, parameters, logits):
    divergence = make_divergence(name, **dict(parameters))
    norms = []
    for temperature in (200.0, 400.0):
        student, teacher = ((side / temperature).log_softmax(-1) for side in logits)
        norms.append((logit_gradient(divergence, student, teacher) / temperature).norm().item())
    order = ORDERS[name, parameters]
    assert divergence.order == order
    assert math.log2(norms[0] / norms[1]) == pytest.approx(order, abs=0.02)
