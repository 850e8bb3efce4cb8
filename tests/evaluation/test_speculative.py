"""What a draft model is worth, against speculative decoding as it is done."""

import numpy as np
import pytest
import torch

from lightning_kd.divergences import TotalVariation
from lightning_kd.evaluation import speed_up, tokens_per_call

CALLS = 40_000


def decoded(q, p, gamma, seed=0):
    """Tokens of each call of the teacher, and all tokens: Algorithm 1 of Leviathan et al."""
    rng = np.random.default_rng(seed)
    left_over = np.maximum(p - q, 0)
    drafts = rng.choice(len(q), (CALLS, gamma), p=q)
    kept = rng.random((CALLS, gamma)) < np.minimum(1, p / q)[drafts]
    number = np.where(kept.all(-1), gamma, kept.argmin(-1))
    instead = rng.choice(len(q), CALLS, p=left_over / left_over.sum())
    further = np.where(number == gamma, rng.choice(len(q), CALLS, p=p), instead)
    text = [drafts[np.arange(gamma) < number[:, None]], further]
    return number + 1, np.concatenate(text)


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_expected_tokens_and_speed_up_are_those_of_simulated_calls(gamma, sharpness):
    scores = sharpness * np.random.default_rng(1).normal(size=(2, 6))
    q, p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    tokens, text = decoded(q, p, gamma)
    # The simulation is right: its text is distributed as the teacher's.
    assert np.bincount(text) / len(text) == pytest.approx(p, abs=0.01)
    distance = TotalVariation()(torch.from_numpy(np.log(q)), torch.from_numpy(np.log(p)))
    acceptance = 1 - distance.item()
    assert 0.2 < acceptance < 0.95
    assert tokens_per_call(acceptance, gamma) == pytest.approx(tokens.mean(), rel=0.02)
    # A call of the teacher takes 1, for one token or for gamma; a step of the student takes 0.3.
    alone, together = tokens.sum() * 1.0, CALLS * (gamma * 0.3 + 1)
    assert speed_up(acceptance, gamma, 0.3) == pytest.approx(alone / together, rel=0.02)
