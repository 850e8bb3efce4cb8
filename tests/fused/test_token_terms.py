"""Quantities over chunks, against automatic differentiation of all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DistributionRows,
    DivergenceTerm,
    Entropy,
    FullDistribution,
    LogitsChunk,
    TeacherCrossEntropy,
    TokenLoss,
    WeightedSum,
    per_token,
    weighted_sum,
)
from lightning_kd.fused.lazy_logits import LazyHeadLogits
from lightning_kd.fused.token_terms import TeacherEntropy, TeacherTokenLogProb, Top1Agreement
from lightning_kd.policy import ImportanceSampling, PPOClip

N, HIDDEN, VOCABULARY = 9, 5, 11


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STATES, HEAD = draw(N, HIDDEN), draw(VOCABULARY, HIDDEN, seed=1)
TEACHER = draw(N, VOCABULARY, seed=2)
TOKENS = torch.tensor([3, 0, 10, -100, 7, 7, 1, -100, 2])
KNOWN = TOKENS != -100
WEIGHTS = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def fused(token_term):
    """Value of the weighted sum, values, and gradients, a chunk of two positions at a time."""
    states, head = STATES.clone().requires_grad_(), HEAD.clone().requires_grad_()
    source = LazyHeadLogits(((states, head),))
    theirs = FullDistribution((LazyHeadLogits(((TEACHER, torch.eye(VOCABULARY).double()),)),))
    chunked_pass = ChunkedPass(source, theirs, [token_term], chunk_bytes=8 * VOCABULARY * 2 * 2)
    total, values = weighted_sum(chunked_pass, [WEIGHTS])
    again = (per_token(chunked_pass)[0] * WEIGHTS).sum()
    pairs = [torch.autograd.grad(t, (states, head)) for t in (total, again)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    return total, values[0], pairs[0]


def dense(values_of):
    """The same of a function of all logits."""
    states, head = STATES.clone().requires_grad_(), HEAD.clone().requires_grad_()
    values = values_of(states @ head.T)
    total = (values * WEIGHTS).sum()
    return total, values, torch.autograd.grad(total, (states, head))


def assert_same(first, second):
    for one, other in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def chosen(logits, temperature):
    picked = (logits / temperature).log_softmax(-1)[torch.arange(N), TOKENS.clamp(min=0)]
    return picked.where(KNOWN, 0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("surrogate", [ImportanceSampling(), PPOClip()], ids=["is", "ppo"])
def test_a_policy_gradient_at_a_sampling_temperature(surrogate, temperature):
    """The formulas of both surrogates, written out on all logits."""
    before = chosen(STATES @ HEAD.T, temperature) + 0.3 * draw(N, seed=4)
    advantages = draw(N, seed=5)

    def loss(log_probs, rows):
        return surrogate(log_probs, before[rows], advantages[rows])

    def formula(logits):
        ratio = (chosen(logits, temperature) - before).exp()
        if isinstance(surrogate, PPOClip):
            clipped = ratio.clamp(0.8, 1.2) * advantages
            return -torch.minimum(ratio * advantages, clipped).where(KNOWN, 0.0)
        return -(ratio * advantages).where(KNOWN, 0.0)

    assert_same(fused(TokenLoss(TOKENS, loss, temperature=temperature)), dense(formula))


def test_a_combination_is_the_sum_of_its_parts_at_each_position():
    factor = draw(N, seed=6)
    parts = (
        (DivergenceTerm(ReverseKL(), student_temperature=2.0, teacher_temperature=0.5), factor),
        (CrossEntropy(TOKENS), 0.7),
        (TeacherCrossEntropy(), 0.0),
        (Entropy(), -1.5),
    )

    def formula(logits):
        log_q, log_p = (logits / 2).log_softmax(-1), (TEACHER / 0.5).log_softmax(-1)
        log_q1 = logits.log_softmax(-1)
        reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
        entropy = -(log_q1.exp() * log_q1).sum(-1)
        return factor * reverse - 0.7 * chosen(logits, 1.0) - 1.5 * entropy

    token_term = WeightedSum(*parts)
    assert_same(fused(token_term), dense(formula))
    chunk = LogitsChunk(slice(0, N), STATES @ HEAD.T, DistributionRows((TEACHER,)))
    torch.testing.assert_close(token_term.values(chunk), formula(STATES @ HEAD.T))


class Sizes(TorchDispatchMode):
    """Rows of every buffer that is allocated as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format and made.shape[1:] == (VOCABULARY,):
            self.rows.append(made.shape[0])
        return made


@pytest.mark.parametrize(("positions", "rows"), [(0, 0), (1, 1), (4, 4), (5, 3), (9, 3)])
def test_no_chunk_is_much_shorter_than_another(positions, rows):
    """Room for four positions: five are cut into 3 and 2, and none needs no room."""
    source = LazyHeadLogits(((STATES[:positions], HEAD),))
    chunked_pass = ChunkedPass(source, None, [Entropy()], chunk_bytes=8 * VOCABULARY * 4)
    with Sizes() as seen:
        values = chunked_pass.values()
    assert seen.rows == [rows]
    assert values.shape == (1, positions)


@pytest.mark.parametrize(
    "token_term",
    [TeacherEntropy(), TeacherCrossEntropy(), TeacherTokenLogProb(TOKENS), Top1Agreement()],
)
def test_a_quantity_of_the_teacher_is_asked_for_alone(token_term):
    theirs = FullDistribution((LazyHeadLogits(((TEACHER, torch.eye(VOCABULARY).double()),)),))
    alone = per_token(ChunkedPass(LazyHeadLogits(((STATES, HEAD),)), theirs, [token_term]))[0]
    whole = token_term.values(
        LogitsChunk(slice(0, N), STATES @ HEAD.T, DistributionRows((TEACHER,)))
    )
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-13)


def test_a_teacher_that_no_quantity_needs_is_not_run():
    class Idle(LazyHeadLogits):
        def fill(self, rows, out):
            raise AssertionError("nobody asked")

    theirs = FullDistribution((Idle(((TEACHER, torch.eye(VOCABULARY).double()),)),))
    source = LazyHeadLogits(((STATES, HEAD),))
    values = per_token(ChunkedPass(source, theirs, [CrossEntropy(TOKENS)]))[0]
    torch.testing.assert_close(values, -chosen(STATES @ HEAD.T, 1.0), rtol=1e-12, atol=1e-13)


def test_the_values_beside_a_sum_say_that_they_have_no_gradient():
    states = STATES.clone().requires_grad_()
    chunked_pass = ChunkedPass(LazyHeadLogits(((states, HEAD),)), None, [CrossEntropy(TOKENS)])
    total, values = weighted_sum(chunked_pass, [WEIGHTS])
    assert total.requires_grad
    assert not values.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapted_head_of_two_products_has_the_gradient_of_each(bias):
    """As LoRA on an output head: a second product of low rank."""
    sizes = [(N, HIDDEN), (VOCABULARY, HIDDEN), (N, 2), (VOCABULARY, 2), (VOCABULARY,)]
    tensors = [draw(*size, seed=10 + k).requires_grad_() for k, size in enumerate(sizes)]
    states, head, low, up, offset = tensors
    wanted = tensors if bias else tensors[:4]
    source = LazyHeadLogits(((states, head), (low, up)), offset if bias else None)
    chunked_pass = ChunkedPass(source, None, [CrossEntropy(TOKENS)], chunk_bytes=8 * VOCABULARY * 2)
    logits = states @ head.T + low @ up.T + (offset if bias else 0)
    dense = -(chosen(logits, 1.0) * WEIGHTS).sum()
    expected = torch.autograd.grad(dense, wanted)
    for total in (
        weighted_sum(chunked_pass, [WEIGHTS])[0],
        (per_token(chunked_pass)[0] * WEIGHTS).sum(),
    ):
        torch.testing.assert_close(total, dense, rtol=1e-12, atol=1e-13)
        for got, right in zip(torch.autograd.grad(total, wanted), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)
    again = source.detached_to(torch.device("cpu"))
    for one, other in zip(again.inputs, source.inputs, strict=True):
        assert torch.equal(one, other)
