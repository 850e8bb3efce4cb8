import itertools

import pytest
import torch

from lightning_kd.divergences import ForwardKL, ReverseKL, TotalVariation


def test_is_the_largest_difference_of_any_event(log_probs):
    student, teacher = (side[0, 0, :6].log_softmax(-1) for side in log_probs)
    difference = (teacher.exp() - student.exp()).tolist()
    events = itertools.chain.from_iterable(
        itertools.combinations(difference, size) for size in range(7)
    )
    largest = max(abs(sum(event)) for event in events)
    assert TotalVariation()(student, teacher).item() == pytest.approx(largest, abs=1e-15)


def test_is_a_metric_in_the_unit_interval(many_log_probs):
    student, teacher = many_log_probs
    third = student.roll(1, dims=1)
    distance = TotalVariation()
    assert distance(student, teacher).min() >= 0
    assert 0.999 < distance(student, teacher).max() <= 1 + 1e-15
    assert torch.equal(distance(student, teacher), distance(teacher, student))
    detour = distance(student, third) + distance(third, teacher)
    assert (distance(student, teacher) <= detour + 1e-15).all()


@pytest.mark.parametrize("kl", [ForwardKL(), ReverseKL()])
def test_pinsker_and_bretagnolle_huber(kl, many_log_probs):
    square = TotalVariation()(*many_log_probs).square()
    assert (square <= kl(*many_log_probs) / 2 + 1e-14).all()
    assert (square <= -torch.expm1(-kl(*many_log_probs)) + 1e-14).all()
