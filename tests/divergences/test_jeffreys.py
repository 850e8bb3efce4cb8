import torch

from lightning_kd.divergences import ForwardKL, Jeffreys, ReverseKL


def test_is_the_sum_of_both_kl_divergences(log_probs):
    total = ForwardKL()(*log_probs) + ReverseKL()(*log_probs)
    torch.testing.assert_close(Jeffreys()(*log_probs), total, rtol=1e-14, atol=0)


def test_is_symmetric(log_probs):
    student, teacher = log_probs
    swapped = Jeffreys()(teacher, student)
    torch.testing.assert_close(Jeffreys()(student, teacher), swapped, rtol=1e-14, atol=0)
