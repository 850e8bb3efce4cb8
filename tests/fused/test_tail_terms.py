"""What a teacher's tail hides, by the enumeration of all tokens, against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    LazyHeadLogits,
    LogitsChunk,
    MaterializedLogits,
    SquaredScore,
    TailLoss,
    TokenLoss,
    TopK,
    WeightedSum,
    evaluate_no_grad,
    weighted_sum,
)

TEMPERATURES = [(1.0, 1.0), (2.0, 2.0), (1.0, 0.5)]


def logits(seed, width):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(width, generator=generator, dtype=torch.float64)


def named(teacher, ids, temperatures=(1.0,)):
    """The same k tokens at each of V positions, one for every token that may be sampled."""
    width = len(teacher)
    rest = [v for v in range(width) if v not in ids]
    tails = {
        tau: (teacher / tau).log_softmax(-1)[rest].logsumexp(-1).expand(width)
        for tau in temperatures
        if rest
    }
    ids = torch.tensor(ids)
    return TopK(ids.expand(width, -1), teacher.log_softmax(-1)[ids].expand(width, -1), tails)


def in_tail(answer, width):
    return (answer.token_ids != torch.arange(width)[:, None]).all(-1)


def full_gradient(student, teacher, tau, tau_teacher):
    z = student.clone().requires_grad_()
    own, other = (z / tau).log_softmax(-1), (teacher / tau_teacher).log_softmax(-1)
    kl = (own.exp() * (own - other)).sum()
    return torch.autograd.grad(kl, z)[0], kl.detach()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 8),
    data=st.data(),
    temperatures=st.sampled_from(TEMPERATURES),
)
def test_events_and_hidden_part_are_the_reverse_kl_on_average(seed, width, data, temperatures):
    """Any tokens may be named, the most likely or not; value and gradient, to 1e-10."""
    ids = data.draw(st.lists(st.integers(0, width - 1), min_size=1, unique=True))
    tau, tau_teacher = temperatures
    student, teacher = logits(seed, width), logits(seed + 1, width)
    answer = named(teacher, ids, {1.0, tau_teacher})
    tokens = torch.arange(width)
    term = WeightedSum(
        (DivergenceTerm(ReverseKL(), student_temperature=tau, teacher_temperature=tau_teacher), 1),
        (
            TailLoss(
                tokens,
                in_tail(answer, width),
                (teacher / tau_teacher).log_softmax(-1),
                lambda log_probs, hidden, rows: (log_probs - log_probs.detach()).exp() * hidden,
                student_temperature=tau,
                teacher_temperature=tau_teacher,
            ),
            1.0,
        ),
    )
    hidden = student.expand(width, -1).clone().requires_grad_()
    weight = torch.eye(width, dtype=torch.float64)
    lazy = LazyHeadLogits(((hidden, weight),))
    sampled = (student / tau).softmax(-1)
    total, _ = weighted_sum(ChunkedPass(lazy, answer, [term]), [sampled])
    total.backward()
    gradient, kl = full_gradient(student, teacher, tau, tau_teacher)
    torch.testing.assert_close(hidden.grad.sum(0), gradient, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(total, kl, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("tau", "tau_teacher"), TEMPERATURES)
def test_the_closed_form_is_what_autograd_finds(tau, tau_teacher):
    width = 6
    student, teacher = logits(3, width), logits(4, width)
    answer = named(teacher, [1, 4], {1.0, tau_teacher})
    term = TailLoss(
        torch.tensor([0, 1, -100, 3, 4, 5]),
        in_tail(answer, width),
        (teacher / tau_teacher).log_softmax(-1),
        lambda log_probs, hidden, rows: log_probs.exp() * (hidden + rows.start),
        student_temperature=tau,
        teacher_temperature=tau_teacher,
    )
    rows = slice(0, width)
    z = student.expand(width, -1).clone().requires_grad_()
    teacher_rows = answer.rows(rows, (), width)
    values, gradient = term.values_and_gradient(LogitsChunk(rows, z.detach(), teacher_rows))
    by_autograd = term.values(LogitsChunk(rows, z, teacher_rows))
    (expected,) = torch.autograd.grad(by_autograd.sum(), z)
    torch.testing.assert_close(values, by_autograd.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert values[2] == 0
    assert gradient[2].abs().max() == 0


def test_nothing_is_hidden_where_the_token_is_named_or_there_is_no_tail():
    width = 4
    student, teacher = logits(0, width).expand(width, -1), logits(1, width)
    for ids in ([2, 0], [0, 1, 2, 3]):
        answer = named(teacher, ids)
        term = TailLoss(
            torch.arange(width),
            in_tail(answer, width),
            teacher.log_softmax(-1),
            lambda log_probs, hidden, rows: hidden,
        )
        hidden = evaluate_no_grad(ChunkedPass(MaterializedLogits(student), answer, [term]))[0]
        outside = [v not in ids for v in range(width)]
        assert ((hidden != 0) == torch.tensor(outside)).all()


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_squared_score_is_the_squared_norm_of_the_gradient(tau):
    width = 5
    z = logits(7, width).expand(width, -1).clone().requires_grad_()
    tokens = torch.tensor([0, 1, 2, 3, -100])
    factors = torch.tensor([0.5, -2.0, 3.0, 1.0, 9.0], dtype=torch.float64)
    factor = TokenLoss(tokens, lambda log_probs, rows: factors[rows] + 0 * log_probs)
    square = SquaredScore(tokens, factor, temperature=tau)
    got = evaluate_no_grad(ChunkedPass(MaterializedLogits(z.detach()), None, [square]))[0]
    for row in range(4):
        log_prob = (z[row] / tau).log_softmax(-1)[tokens[row]]
        (score,) = torch.autograd.grad(log_prob, z)
        expected = np.linalg.norm(factors[row].item() * score.numpy()) ** 2
        assert got[row].item() == pytest.approx(expected, rel=1e-12)
    assert got[4] == 0
