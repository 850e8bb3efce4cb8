"""Drawn tokens, against NumPy and by enumerating every draw."""

import itertools

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from lightning_kd.divergences import ForwardKL
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    MaterializedLogits,
    SampledTokens,
    sampled_of,
    summaries,
    tail_draws_of,
    weighted_sum,
)
from lightning_kd.fused.summaries import top_k_of

N, V = 9, 12
TARGETS = torch.tensor([3, -100, 11, 0, 5, 5, 1, -100, 7])


def draw(seed, shape=(N, V)):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def full(logits):
    """Lazy logits of an identity head."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return FullDistribution((LazyHeadLogits(((logits, eye),)),))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_draws_do_not_depend_on_chunks(rows, monkeypatch):
    answer, top = full(draw(1)), top_k_of(full(draw(1)), TARGETS, 3)
    whole = sampled_of(answer, 5, seeded()), tail_draws_of(answer, top, 5, seeded())
    monkeypatch.setattr(summaries, "CHUNK_BYTES", rows * V * 4 * 2)
    parts = sampled_of(answer, 5, seeded()), tail_draws_of(answer, top, 5, seeded())
    for one, other in zip(parts, whole, strict=True):
        one.check(N, V)
        assert torch.equal(one.token_ids, other.token_ids)
        torch.testing.assert_close(one.weights, other.weights)
        p = scipy.special.softmax(draw(1).numpy(), -1)
        np.testing.assert_allclose(one.entropies.numpy(), scipy.stats.entropy(p.T), rtol=1e-12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [0, 4])
def test_tokens_are_drawn_as_often_as_they_are_likely(k):
    logits = draw(8, (1, V)).expand(4000, V)
    p = scipy.special.softmax(logits[0].numpy())
    if k:
        top = top_k_of(full(logits), torch.zeros(4000, dtype=torch.long), k)
        drawn = tail_draws_of(full(logits), top, 10, seeded())
        named = top.token_ids[0].numpy()
        np.testing.assert_allclose(drawn.weights[0, :k].numpy(), p[named], rtol=1e-12)
        np.testing.assert_allclose(drawn.weights.sum(-1).numpy(), 1.0, rtol=1e-12)
        p[named] = 0.0
    else:
        drawn = sampled_of(full(logits), 10, seeded())
    counts = np.bincount(drawn.token_ids[:, k:].flatten().numpy(), minlength=V)
    assert (counts[p == 0] == 0).all()
    likely = p > 0
    expected = p[likely] / p[likely].sum() * counts.sum()
    assert scipy.stats.chisquare(counts[likely], expected).pvalue > 1e-3


def expectation_of(answer, probabilities, student, term):
    """Expected value and gradient, where each position is one outcome of the draws."""
    leaf = student.clone().requires_grad_()
    states = leaf.expand(len(probabilities), len(student))
    head = LazyHeadLogits(((states, torch.eye(len(student)).double()),))
    total, _ = weighted_sum(ChunkedPass(head, answer, [term], 2000), [probabilities])
    total.backward()
    return total.detach().numpy(), leaf.grad.numpy()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("tokens", "k", "draws"), [(5, 0, 3), (6, 2, 3), (4, 3, 2)])
def test_the_expected_loss_and_gradient_are_those_of_the_forward_kl(tokens, k, draws, temperature):
    """Every outcome of the draws, with its probability."""
    u, z = draw(3, (tokens,)), draw(4, (tokens,))
    p, q = scipy.special.softmax(u.numpy()), scipy.special.softmax(z.numpy() / temperature)
    named = np.argsort(-p)[:k]
    rest = np.setdiff1d(np.arange(tokens), named)
    outcomes = np.array(list(itertools.product(rest, repeat=draws)))
    mass = p[rest].sum()
    probabilities = torch.from_numpy((p[outcomes] / mass).prod(-1))
    many = len(outcomes)
    ids = np.concatenate([np.tile(named, (many, 1)), outcomes], -1).astype(np.int64)
    weights = np.concatenate(
        [np.tile(p[named], (many, 1)), np.full((many, draws), mass / draws)], -1
    )
    answer = SampledTokens(
        torch.from_numpy(ids),
        torch.from_numpy(weights),
        torch.full((many,), scipy.stats.entropy(p), dtype=torch.float64),
    )
    answer.check(many, tokens)
    term = DivergenceTerm(ForwardKL(), student_temperature=temperature)
    value, gradient = expectation_of(answer, probabilities, z, term)
    np.testing.assert_allclose(value, scipy.special.rel_entr(p, q).sum(), rtol=1e-10)
    np.testing.assert_allclose(gradient, (q - p) / temperature, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: sampled_of(a, 0), "draws is 0; it must be positive"),
        (lambda a: tail_draws_of(a, top_k_of(a, TARGETS, 2), 0), "draws is 0"),
        (lambda a: tail_draws_of(a, top_k_of(a, TARGETS, V), 3), "all 12 tokens are named"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(FullDistribution((MaterializedLogits(draw(1)),)))


def test_no_position_is_no_trouble():
    none, targets = full(draw(1)[:0]), TARGETS[:0]
    top = top_k_of(none, targets, 3)
    for answer in (top, sampled_of(none, 2), tail_draws_of(none, top, 2)):
        answer.check(0, V)
