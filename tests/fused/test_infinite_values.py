"""Infinite divergences and logits: what weighs nothing adds nothing, in values and in gradients."""

import math

import numpy as np
import pytest
import torch

from lightning_kd.divergences import AdaptiveKL, ReverseKL, available_divergences
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DistributionRows,
    DivergenceTerm,
    Entropy,
    FullDistribution,
    LogitsChunk,
    TopK,
    WeightedSum,
    ZeroTerm,
    fused_linear_divergence,
    weighted_sum,
)
from lightning_kd.fused.lazy_logits import LazyHeadLogits, MaterializedLogits
from lightning_kd.models import DenseLogits
from lightning_kd.modules.loss import EvaluatedTerm
from lightning_kd.scoring import ScoredPositions

INFINITE = [1, 3]
"""Positions whose teacher excludes a token that the student may say."""
WEIGHTS = torch.tensor([1.0, 0.0, 0.25, 0.0, 2.0], dtype=torch.float64)


def tensors(seed=0):
    """Hidden states and heads; the teacher's bias takes a token out where its last state is 1."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    weight, other = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return student.requires_grad_(), weight.requires_grad_(), teacher, other


def excluded(teacher, other):
    """A head of one more input, by which the rows of ``INFINITE`` overflow at token 2."""
    column = torch.zeros(5, 1, dtype=torch.float64)
    column[INFINITE] = 1e10
    ban = torch.zeros(7, 1, dtype=torch.float64)
    ban[2] = -1e300
    return torch.cat([teacher, column], 1), torch.cat([other, ban], 1)


def reference(student, weight, teacher, other):
    """The sum over the finite rows alone: value and gradients from NumPy."""
    h, w = student.detach().numpy(), weight.detach().numpy()
    z, u = h @ w.T, (teacher @ other.T).numpy()
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    u = u - u.max(-1, keepdims=True)
    log_p = u - np.log(np.exp(u).sum(-1, keepdims=True))
    q, total, of_logits = np.exp(log_q), 0.0, np.zeros_like(z)
    for row, share in enumerate(WEIGHTS.tolist()):
        if row not in INFINITE:
            terms = q[row] * (log_q[row] - log_p[row])
            total += share * terms.sum()
            of_logits[row] = share * (terms - q[row] * terms.sum())
    return total, of_logits @ w, of_logits.T @ h


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_weight_0_takes_an_infinite_divergence_out(mode):
    student, weight, teacher, other = tensors()
    teacher, other = excluded(teacher, other)
    result = fused_linear_divergence(
        student, weight, teacher, other, divergence="reverse_kl", weights=WEIGHTS, mode=mode
    )
    total, of_states, of_weight = reference(student, weight, teacher, other)
    assert torch.equal(result.values.isinf(), WEIGHTS == 0)
    assert result.total.item() == pytest.approx(total, rel=1e-12)
    result.total.backward()
    np.testing.assert_allclose(student.grad, of_states, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(weight.grad, of_weight, rtol=1e-10, atol=1e-12)


def banned(logits, rows=INFINITE, token=2):
    """Logits of minus infinity at a token in some rows."""
    ban = torch.zeros_like(logits, dtype=torch.bool)
    ban[rows, token] = True
    return logits.masked_fill(ban, -math.inf)


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_same_where_logits_are_minus_infinity(dense, combined):
    """Really infinite values, through both ways to logits, and as a factor of a position."""
    student, weight, teacher, other = tensors()
    source = LazyHeadLogits(((student, weight),))
    theirs = FullDistribution((MaterializedLogits(banned(teacher @ other.T)),))
    token_term, weights = DivergenceTerm(ReverseKL()), WEIGHTS
    if combined:
        token_term, weights = WeightedSum((token_term, WEIGHTS)), torch.ones_like(WEIGHTS)
    if dense:
        given = MaterializedLogits(student @ weight.T)
        total, values = DenseLogits().evaluate(given, theirs, [token_term], [weights])
    else:
        total, values = weighted_sum(ChunkedPass(source, theirs, [token_term]), [weights])
    teacher, other = excluded(teacher, other)
    exact, of_states, of_weight = reference(student, weight, teacher, other)
    assert torch.equal(values[0].isinf(), (WEIGHTS == 0) & torch.tensor(not combined))
    assert total.item() == pytest.approx(exact, rel=1e-12)
    total.backward()
    np.testing.assert_allclose(student.grad, of_states, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(weight.grad, of_weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("token_term", [ZeroTerm(), Entropy(), CrossEntropy(torch.tensor([0] * 5))])
def test_a_student_that_excludes_a_token_has_finite_gradients(token_term):
    logits = banned(torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    total, values = DenseLogits().evaluate(
        MaterializedLogits(logits), None, [token_term, Entropy()], [WEIGHTS, None]
    )
    total.backward()
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()
    chunk = LogitsChunk(slice(0, 5), logits.detach())
    gradient = token_term.values_and_gradient(chunk)[1]
    np.testing.assert_allclose(logits.grad, WEIGHTS[:, None] * gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", [n for n in available_divergences() if "forward" not in n])
def test_a_student_that_excludes_every_token_of_the_tail(name, temperature):
    """Automatic gradients are those of the closed form, and of the events alone."""
    logits = torch.tensor([[1.0, 0.0, -math.inf, -math.inf, -math.inf]] * 2, dtype=torch.float64)
    logits[1, 3] = 0.5  # not all of them
    answer = TopK(torch.tensor([[0, 1]] * 2), torch.tensor([[0.5, 0.3]] * 2).double().log())
    term = DivergenceTerm(name, student_temperature=temperature)
    leaf = logits.clone().requires_grad_()
    values = term.values(LogitsChunk(slice(0, 2), leaf, answer.rows(slice(0, 2), (), 5)))
    closed = term.values_and_gradient(
        LogitsChunk(slice(0, 2), logits, answer.rows(slice(0, 2), (), 5))
    )
    torch.testing.assert_close(values.detach(), closed[0])
    finite = values.isfinite()
    assert finite[1]
    values[finite].sum().backward()
    torch.testing.assert_close(leaf.grad[finite], closed[1][finite], rtol=1e-9, atol=1e-12)
    assert leaf.grad.isfinite().all()


def test_sums_leave_out_what_has_no_weight():
    """A row, and a whole term, without weight."""
    labels = torch.tensor([[-100, 5, 6], [-100, 7, -100]])
    scored = ScoredPositions.from_labels(labels)
    infinite = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    terms = {
        "a": EvaluatedTerm(infinite, 1.0, scored, weights, torch.ones(()), 1.0, False),
        "b": EvaluatedTerm(infinite, 0.0, scored, ones, torch.ones(()), 1.0, False),
    }
    assert terms["a"].sums().tolist() == [3.0, 3.0, 1.0]
    assert terms["b"].sums().tolist() == [math.inf, 0.0, 1.0]


def test_adaptive_kl_without_weight_on_the_infinite_side():
    """Head equal, and a tail that the student excludes: all weight is on the reverse KL."""
    teacher = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    student = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log()
    exact = 0.4 * math.log(0.4 / 0.3)
    assert AdaptiveKL(mu=0.7)(student, teacher).item() == pytest.approx(exact, rel=1e-12)
    chunk = LogitsChunk(slice(0, 1), student[None], DistributionRows((teacher[None],)))
    values, gradient = DivergenceTerm(AdaptiveKL(mu=0.7)).values_and_gradient(chunk)
    assert values.item() == pytest.approx(exact, rel=1e-12)
    assert gradient.isfinite().all()
