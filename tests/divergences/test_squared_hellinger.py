import torch

from lightning_kd.divergences import ForwardKL, SquaredHellinger, TotalVariation


def test_is_symmetric_and_reaches_one(many_log_probs):
    student, teacher = many_log_probs
    value = SquaredHellinger()(student, teacher)
    assert torch.equal(value, SquaredHellinger()(teacher, student))
    assert 0.999 < value.max() <= 1 + 1e-15


def test_total_variation_lies_between_its_bounds(many_log_probs):
    value, distance = SquaredHellinger()(*many_log_probs), TotalVariation()(*many_log_probs)
    assert (value <= distance + 1e-14).all()
    assert (distance.square() <= value * (2 - value) + 1e-14).all()


def test_at_most_half_the_kl_divergence(many_log_probs):
    value = SquaredHellinger()(*many_log_probs)
    assert (value <= ForwardKL()(*many_log_probs) / 2 + 1e-14).all()


def test_does_not_cancel_near_agreement():
    """At a distance of 1e-6 the other form, ``1 - sum sqrt(p q)``, has no digit left in float32."""
    teacher = torch.zeros(2).log_softmax(-1).double()
    student = torch.tensor([1e-3, -1e-3], dtype=torch.float64).log_softmax(-1)
    exact = SquaredHellinger()(student, teacher)
    assert exact < 1e-6
    value = SquaredHellinger()(student.float(), teacher.float())
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
