"""What is certain of a tail at another temperature, against distributions that are drawn."""

import numpy as np
import pytest
import torch

from lightning_kd.fused import TopK
from lightning_kd.fused.tail_bounds import tail_bounds

V = 40


def drawn(rng, k, temperature):
    """Log-probabilities of the k likeliest tokens, the tail at 1 and the tail at a temperature."""
    logits = rng.normal(size=(200, V)) * rng.choice([0.1, 1.0, 4.0, 12.0], size=(200, 1))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ranked = -np.sort(-probabilities, axis=-1)
    powers = ranked ** (1 / temperature)
    tail = powers[:, k:].sum(-1) / powers.sum(-1)
    return (torch.tensor(v) for v in (np.log(ranked[:, :k]), ranked[:, k:].sum(-1), tail))


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.5, 2.0, 8.0])
@pytest.mark.parametrize("k", [1, 4, 39])
def test_true_tails_are_within(temperature, k):
    named, rest, tail = drawn(np.random.default_rng(k), k, temperature)
    lower, upper = tail_bounds(named, (rest, rest), V - k, temperature)
    assert (lower.exp() <= tail * (1 + 1e-9)).all()
    assert (upper.exp() >= tail * (1 - 1e-9)).all()
    ids = torch.arange(k).expand(len(named), k)
    TopK(ids, named, {1.0: rest.log(), temperature: tail.log()}).check(len(named), V)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_bounds_are_reached(temperature):
    """By others that are all alike, and by one that has as much as the last named token."""
    for others in ([0.05] * 5, [0.25]):
        ranked = np.array([0.5, 0.25, *others])
        powers = ranked ** (1 / temperature)
        tail = powers[2:].sum() / powers.sum()
        named, rest = torch.tensor(ranked[:2]).log()[None], torch.tensor([0.25]).double()
        bounds = tail_bounds(named, (rest, rest), 5, temperature)
        assert min(abs(bound.exp() - tail) for bound in bounds) < 1e-12


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_tail_that_cannot_be_is_refused(share):
    named = torch.tensor([[0.5, 0.25]]).log()
    tails = {1.0: torch.tensor([0.25]).log(), 2.0: torch.tensor([share]).log()}
    with pytest.raises(ValueError, match=r"tail of probability .* at temperature 2 at position 0"):
        TopK(torch.tensor([[3, 4]]), named, tails).check(1, 9)
