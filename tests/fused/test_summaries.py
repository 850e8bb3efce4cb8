"""Short answers that are made of full ones, against numpy in float64."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused import FullDistribution, LazyHeadLogits
from lightning_kd.fused import summaries as module
from lightning_kd.fused.summaries import top_k_of

N, H, V = 7, 5, 19


def head(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(N, H, generator=generator, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, dtype=dtype)
    return LazyHeadLogits(((states, weight),))


def scores(lazy):
    states, weight = lazy.factors[0]
    return states.double().numpy() @ weight.double().numpy().T


TARGETS = torch.tensor([3, 0, IGNORE_INDEX, 18, 4, 5, 6])


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("rows_at_once", [2, N])
def test_top_k_tail_and_label(k, rows_at_once, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_at_once * V * 8)
    lazy = head()
    short = top_k_of(FullDistribution((lazy,)), TARGETS, k, temperatures=(1.0, 0.5, 2.0))
    short.check(N, V)
    expected = log_softmax(scores(lazy), -1)
    best = np.argsort(-expected, -1)[:, :k]
    assert np.array_equal(short.token_ids.numpy(), best)
    assert short.log_probs.numpy() == pytest.approx(np.take_along_axis(expected, best, -1))
    for row, target in enumerate(TARGETS.tolist()):
        own = 0.0 if target == IGNORE_INDEX else expected[row, target]
        assert short.label_log_probs[row].item() == pytest.approx(own)
    assert set(short.tail_log_probs) == (set() if k == V else {1.0, 0.5, 2.0})
    for temperature, tail in short.tail_log_probs.items():
        tempered = log_softmax(scores(lazy) / temperature, -1)
        rest = [np.delete(row, named) for row, named in zip(tempered, best, strict=True)]
        assert tail.numpy() == pytest.approx([logsumexp(row) for row in rest])


def test_an_ensemble_counts_as_one():
    lazy = (head(0), head(1))

    def mean(logits, temperature):
        return ((logits[0] + logits[1]) / 2 / temperature).log_softmax(-1)

    short = top_k_of(FullDistribution(lazy, mean), TARGETS, 3)
    expected = log_softmax((scores(lazy[0]) + scores(lazy[1])) / 2, -1)
    assert np.array_equal(short.token_ids.numpy(), np.argsort(-expected, -1)[:, :3])


def test_a_tail_without_probability_is_finite():
    lazy = head(dtype=torch.float32)
    states, weight = lazy.factors[0]
    short = top_k_of(FullDistribution((LazyHeadLogits(((states, weight * 1e4),)),)), TARGETS, 2)
    short.check(N, V)


def test_no_positions():
    lazy = head()
    states, weight = lazy.factors[0]
    none = FullDistribution((LazyHeadLogits(((states[:0], weight),)),))
    top_k_of(none, TARGETS[:0], 4).check(0, V)


@pytest.mark.parametrize("k", [0, V + 1])
def test_a_k_that_there_is_not_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}; the teacher knows 19 tokens"):
        top_k_of(FullDistribution((head(),)), TARGETS, k)
