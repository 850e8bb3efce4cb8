"""The most likely tokens that student and teacher share, against NumPy on all logits."""

import numpy as np
import pytest
import torch

from lightning_kd.fused import (
    ChunkedPass,
    Entropy,
    FullDistribution,
    LogitsChunk,
    MaterializedLogits,
    StudentOverlapMass,
    TeacherOverlapMass,
    TopKOverlap,
    evaluate_no_grad,
)
from lightning_kd.teachers.routed import RoutedDistribution
from tests.support.sparse_teachers import tell

N, VOCABULARY = 23, 40


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = draw(0, N, VOCABULARY), draw(1, N, VOCABULARY)
TEACHER[:12] += 2 * STUDENT[:12]  # some that agree, and some that do not


def by_sets(student, teacher, k):
    """Share of the tokens, and each side's probability of them, by sorting and counting."""
    rows = []
    for own, their in zip(student.numpy(), teacher.numpy(), strict=True):
        q, p = (np.exp(z) / np.exp(z).sum() for z in (own, their))
        shared = sorted(set(np.argsort(-q)[:k]) & set(np.argsort(-p)[:k]))
        rows.append((len(shared) / k, q[shared].sum(), p[shared].sum()))
    return np.array(rows).T


def evaluated(answer, k, student=STUDENT):
    terms = [TopKOverlap(k), Entropy(), StudentOverlapMass(k), TeacherOverlapMass(k)]
    three_rows = 3 * VOCABULARY * 8 * 2
    chunks = ChunkedPass(MaterializedLogits(student), answer, terms, chunk_bytes=three_rows)
    return evaluate_no_grad(chunks)[[0, 2, 3]].numpy()


@pytest.mark.parametrize("k", [1, 4, 16, VOCABULARY])
@pytest.mark.parametrize("kind", ["full_distribution", "top_k", "top_k_and_token"])
@pytest.mark.parametrize("more", [0, 7])
def test_it_is_what_sets_of_all_tokens_say(kind, k, more):
    """Of a teacher that tells k tokens, and of one that tells more."""
    answer = tell(TEACHER, torch.zeros(N, dtype=torch.long), kind, k=min(k + more, VOCABULARY))
    expected = by_sets(STUDENT, TEACHER, k)
    assert evaluated(answer, k) == pytest.approx(expected, rel=1e-12)
    if k in (4, 16):  # neither nothing nor all: the reference tells answers apart
        assert 0.1 < expected[0].mean() < 0.9
        assert abs(expected[1] - expected[2]).mean() > 0.05


def test_several_teachers_each_for_its_own_positions():
    routes = torch.arange(N) % 2
    members = tuple(
        FullDistribution((MaterializedLogits(logits[routes == number]),))
        for number, logits in enumerate((TEACHER, draw(2, N, VOCABULARY)))
    )
    logits = TEACHER.clone()
    logits[routes == 1] = draw(2, N, VOCABULARY)[routes == 1]
    answer = RoutedDistribution((MaterializedLogits(logits),), members=members, routes=routes)
    assert evaluated(answer, 5) == pytest.approx(by_sets(STUDENT, logits, 5), rel=1e-12)


def test_equal_sides_share_everything_and_disjoint_ones_nothing():
    one = torch.tensor([[5.0, 4.0, 0.0, -1.0]]).double()
    same = evaluated(FullDistribution((MaterializedLogits(one),)), 2, one)
    mass = (np.exp(5) + np.exp(4)) / np.exp([5, 4, 0, -1]).sum()
    assert same[:, 0] == pytest.approx([1, mass, mass], rel=1e-12)
    other = evaluated(FullDistribution((MaterializedLogits(one.flip(-1)),)), 2, one)
    assert other[:, 0].tolist() == [0, 0, 0]


def test_an_answer_that_does_not_tell_the_tokens_is_refused():
    targets, rows = torch.zeros(N, dtype=torch.long), slice(0, N)
    for kind, message in (("top_k", "k is 5; the teacher names 4"), ("sampled", "does not tell")):
        chunk = LogitsChunk(rows, STUDENT, tell(TEACHER, targets, kind).rows(rows, (), VOCABULARY))
        with pytest.raises(ValueError, match=message):
            TopKOverlap(5).values(chunk)
    with pytest.raises(ValueError, match="k is 0"):
        TopKOverlap(0)


def test_the_tokens_are_found_once_for_all_terms(monkeypatch):
    found = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda *a, **b: found.append(1) or topk(*a, **b))
    evaluated(FullDistribution((MaterializedLogits(TEACHER),)), 4)
    chunks = -(-N // 3)
    assert len(found) == 2 * chunks


def test_no_position_has_no_value():
    answer = FullDistribution((MaterializedLogits(TEACHER[:0]),))
    assert evaluated(answer, 4, STUDENT[:0]).shape == (3, 0)
