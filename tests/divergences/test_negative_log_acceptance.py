import numpy as np
import pytest
import torch

from lightning_kd.divergences import NegativeLogAcceptance, TotalVariation
from tests.support.toys import logit_gradient


def test_it_is_minus_the_logarithm_of_how_often_a_draft_is_accepted():
    """Drafts of the student, each kept with probability ``min(1, p / q)``, as they are counted."""
    rng = np.random.default_rng(0)
    q, p = rng.dirichlet(np.ones(6), 2)
    drafts = rng.choice(6, 400_000, p=q)
    kept = (rng.random(len(drafts)) < np.minimum(1, p / q)[drafts]).mean()
    value = NegativeLogAcceptance()(torch.from_numpy(np.log(q)), torch.from_numpy(np.log(p)))
    assert kept < 0.9
    assert value.item() == pytest.approx(-np.log(kept), rel=0.01)


def test_it_is_a_function_of_the_total_variation_and_so_is_its_gradient(many_log_probs):
    distance = TotalVariation()(*many_log_probs)
    value = NegativeLogAcceptance()(*many_log_probs)
    apart = distance < 0.999
    expected = -np.log1p(-distance[apart].numpy())
    np.testing.assert_allclose(value[apart].numpy(), expected, rtol=1e-10, atol=1e-14)
    assert (value >= distance - 1e-15).all()
    gradient = logit_gradient(NegativeLogAcceptance(), *many_log_probs)
    slope = logit_gradient(TotalVariation(), *many_log_probs) / (1 - distance)[..., None]
    torch.testing.assert_close(gradient[apart], slope[apart], rtol=1e-8, atol=1e-12)


def test_it_still_pulls_where_the_total_variation_is_flat():
    """Student and teacher 60 nats apart: 1 - TV is 1e-26, and float32 has 0 of it."""
    student = torch.tensor([0.0, 60.0, 0.0]).log_softmax(-1)
    teacher = torch.tensor([60.0, 0.0, 0.0]).log_softmax(-1)
    exact = -np.log(3) + 60
    value, gradient = NegativeLogAcceptance().value_and_logit_gradient(student, teacher)
    assert value.item() == pytest.approx(exact, rel=1e-6)
    # A third of what is accepted is the first token, a third the second, which the student likes.
    assert gradient[0].item() == pytest.approx(-1 / 3, rel=1e-4)
    assert gradient[1] > 0.3
    assert logit_gradient(TotalVariation(), student, teacher).abs().max() < 1e-20


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([0.0, -120.0, -105.0], [-120.0, 0.0, -130.0]),
        ([0.0, -400.0, -150.0], [-400.0, 0.0, -410.0]),
        ([0.0, -200.0, -203.0, -190.0], [-203.0, 0.0, -202.0, -199.0]),
    ],
)
def test_where_both_probabilities_are_0_in_float32_the_smaller_still_counts(student, teacher):
    """The formula of the gradient in logarithms, in NumPy and float64."""
    q, p = (np.array(each) - np.logaddexp.reduce(each) for each in (student, teacher))
    accepted = np.logaddexp.reduce(np.minimum(p, q))
    u = np.where(q < p, np.exp(np.minimum(q - accepted, 0)), 0.0)
    expected = np.exp(q) * u.sum() - u
    value, gradient = NegativeLogAcceptance().value_and_logit_gradient(
        *(torch.tensor(each).log_softmax(-1) for each in (student, teacher))
    )
    assert value.item() == pytest.approx(-accepted, rel=1e-6)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_common_token_it_is_infinite_and_without_a_gradient(dtype):
    student_logits = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf], dtype=dtype).requires_grad_()
    teacher = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf], dtype=dtype).log_softmax(-1)
    value = NegativeLogAcceptance()(student_logits.log_softmax(-1), teacher)
    assert value == torch.inf
    value.backward()
    assert not student_logits.grad.nan_to_num(1.0)[:2].any()
    student = student_logits.detach().log_softmax(-1)
    assert not logit_gradient(NegativeLogAcceptance(), student, teacher).any()


def test_one_part_in_a_million_keeps_its_digits_in_float32():
    student = torch.tensor([1e-6, 0.0], dtype=torch.float64).log_softmax(-1)
    teacher = torch.zeros(2, dtype=torch.float64).log_softmax(-1)
    exact = NegativeLogAcceptance()(student, teacher).item()
    assert exact == pytest.approx(2.5e-7, rel=1e-3)
    value = NegativeLogAcceptance()(student.float(), teacher.float()).item()
    assert value == pytest.approx(exact, rel=0.2)
