"""The chunked pass over few tokens: closed forms, tiny tails in float32, and what is allocated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd.divergences import (
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    available_divergences,
    make_divergence,
)
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    MaterializedLogits,
    TokenTerm,
    TopK,
    WeightedSum,
    evaluate_no_grad,
    weighted_sum,
)
from lightning_kd.models import DenseLogits
from tests.support.sparse_teachers import tell

N, V = 7, 11
TARGETS = torch.tensor([3, -100, 10, 0, 5, 5, 1])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 1.5], dtype=torch.float64)


class PearsonChiSquare(Divergence):
    """One that the library does not have, without a closed form."""

    def value(self, student_log_probs, teacher_log_probs):
        return (2 * teacher_log_probs - student_log_probs).exp().sum(-1) - 1


DIVERGENCES = {name: make_divergence(name) for name in available_divergences()}
DIVERGENCES["a user's own"] = PearsonChiSquare()
F_DIVERGENCES = {
    name: divergence
    for name, divergence in DIVERGENCES.items()
    if not isinstance(divergence, AdaptiveKL | AlphaBeta)
} | {"alpha and beta of sum 1": AlphaBeta(0.3, 0.7)}


def draw(seed, scale=1.5, shape=(N, V)):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = draw(0), draw(1)


def answer_of(kind, k=4, temperature=1.0):
    return tell(TEACHER, TARGETS, kind, k, (1.0, temperature))


def fused(terms, answer, weights=None, chunk_rows=2):
    """Values and gradient in the student's logits, by the chunked pass."""
    leaf = STUDENT.clone().requires_grad_()
    head = LazyHeadLogits(((leaf, torch.eye(V, dtype=leaf.dtype)),))
    chunked_pass = ChunkedPass(head, answer, terms, 8 * V * chunk_rows)
    total, values = weighted_sum(chunked_pass, weights or [WEIGHTS] * len(terms))
    total.backward()
    return total.detach(), values, leaf.grad


def automatic(terms, answer, weights=None):
    """The same by automatic differentiation of materialized logits."""
    leaf = STUDENT.clone().requires_grad_()
    total, values = DenseLogits().evaluate(
        MaterializedLogits(leaf), answer, terms, weights or [WEIGHTS] * len(terms)
    )
    total.backward()
    return total.detach(), values, leaf.grad


def assert_same(first, second, tolerance=1e-12):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def softened(divergence, temperature):
    return DivergenceTerm(
        divergence, student_temperature=temperature, teacher_temperature=temperature
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_closed_form_is_the_automatic_gradient(name, k, temperature):
    terms = [softened(DIVERGENCES[name], temperature)]
    answer = answer_of("top_k", k, temperature)
    assert_same(fused(terms, answer), automatic(terms, answer))


@pytest.mark.parametrize("path", [fused, automatic])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_k_of_all_tokens_is_the_whole_distribution(name, temperature, path):
    terms = [softened(DIVERGENCES[name], temperature)]
    whole = path(terms, FullDistribution((MaterializedLogits(TEACHER),)))
    assert_same(path(terms, answer_of("top_k", V, temperature)), whole)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_at_a_temperature_are_over_tempered_events(name, temperature):
    """Events by summing NumPy's probabilities of all tokens."""
    answer = answer_of("top_k", 3, temperature)
    ids = answer.token_ids.numpy()
    sides = []
    for logits in (STUDENT, TEACHER):
        p = np.exp(logits.numpy() / temperature)
        p /= p.sum(-1, keepdims=True)
        known = np.take_along_axis(p, ids, -1)
        np.put_along_axis(p, ids, 0.0, -1)
        events = np.concatenate([known, p.sum(-1, keepdims=True)], -1)
        sides.append(torch.from_numpy(np.log(events)))
    _, values, _ = fused([softened(DIVERGENCES[name], temperature)], answer)
    torch.testing.assert_close(values[0], DIVERGENCES[name](*sides), rtol=1e-11, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_more_tokens_tell_more_of_an_f_divergence_and_never_too_much(seed, scale, temperature):
    student, teacher = (MaterializedLogits(draw(seed + number, scale)) for number in (0, 1))
    terms = [softened(divergence, temperature) for divergence in F_DIVERGENCES.values()]
    answers = [
        tell(teacher.logits, TARGETS, "top_k", k, (1.0, temperature)) for k in range(1, V + 1)
    ]
    whole = evaluate_no_grad(ChunkedPass(student, FullDistribution((teacher,)), terms))
    bounds = torch.stack([evaluate_no_grad(ChunkedPass(student, a, terms)) for a in answers])
    slack = 1e-11 * (1 + whole)
    assert (bounds.diff(dim=0) > -slack).all()
    assert (bounds < whole + slack).all()
    torch.testing.assert_close(bounds[-1], whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("student_tail", [-3.0, -25.0, -60.0])
@pytest.mark.parametrize("teacher_tail", [-3.0, -25.0, -60.0])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_a_tiny_tail_is_as_exact_in_float32_as_a_large_one(divergence, teacher_tail, student_tail):
    """1 less the k probabilities would be 0, or all round-off."""
    z, u = (draw(seed)[:, :4] for seed in (3, 4))
    rest = draw(5)[:, 4:].log_softmax(-1)
    z, u = (
        torch.cat([x.log_softmax(-1) + np.log(-np.expm1(tail)), rest + tail], -1)
        for x, tail in ((z, student_tail), (u, teacher_tail))
    )
    answer = TopK(
        torch.arange(4).expand(N, 4),
        u[:, :4].float(),
        {1.0: torch.full((N,), teacher_tail)},
    )
    answer.check(N, V)
    q, p = (
        np.concatenate([np.exp(x[:, :4].numpy()), np.full((N, 1), np.exp(tail))], -1)
        for x, tail in ((z, student_tail), (u, teacher_tail))
    )
    # Of each event: the summand, and the gradient in the logits of the events.
    if isinstance(divergence, ForwardKL):
        values, of_events = (p * np.log(p / q)).sum(-1), q - p
    else:
        summands = q * np.log(q / p)
        values = summands.sum(-1)
        of_events = summands - q * values[:, None]
    of_logits = np.concatenate([of_events[:, :4], of_events[:, 4:] * np.exp(rest.numpy())], -1)
    leaf = z.float().requires_grad_()
    head = LazyHeadLogits(((leaf, torch.eye(V)),))
    total, found = weighted_sum(
        ChunkedPass(head, answer, [DivergenceTerm(divergence)]), [torch.ones(N)]
    )
    total.backward()
    np.testing.assert_allclose(found[0].numpy(), values, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(leaf.grad[:, :4].numpy(), of_logits[:, :4], rtol=2e-5, atol=1e-6)
    of_rest, slack = leaf.grad[:, 4:].numpy(), 1e-6 * np.exp(max(teacher_tail, student_tail))
    np.testing.assert_allclose(of_rest, of_logits[:, 4:], rtol=1e-4, atol=slack)


class WideStorages(TorchDispatchMode):
    """Rows of each tensor as wide as the vocabulary that gets memory of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.rows = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument in args:
            if isinstance(argument, torch.Tensor):
                self.seen[argument.untyped_storage().data_ptr()] = argument
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                if tensor.untyped_storage().data_ptr() not in self.seen:
                    self.rows.append(len(tensor))
                # Kept, so that no address is given out twice.
                self.seen[tensor.untyped_storage().data_ptr()] = tensor
        return made


@pytest.mark.parametrize("weight", [WEIGHTS, torch.ones(N)], ids=["with a 0", "ones"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["top_k", "top_k_and_token", "sampled"])
def test_nothing_but_the_logits_is_as_wide_as_the_vocabulary(kind, temperature, weight):
    hidden, head = draw(6, shape=(N, 3)).requires_grad_(), draw(7, shape=(V, 3)).requires_grad_()
    answer = answer_of(kind, 4, temperature)
    term = DivergenceTerm(
        ForwardKL(),
        student_temperature=temperature,
        teacher_temperature=1.0 if kind == "sampled" else temperature,
    )
    chunked_pass = ChunkedPass(LazyHeadLogits(((hidden, head),)), answer, [term])
    with WideStorages() as allocated:
        weighted_sum(chunked_pass, [weight])
    assert allocated.rows == [N]


# Several terms read one chunk, and the last may take its place.


class LogitSquare(TokenTerm):
    """Half the squared logits, whose gradient is the logits themselves."""

    def values(self, chunk):
        return chunk.student_logits.square().sum(-1) / 2

    def values_and_gradient(self, chunk):
        return self.values(chunk), chunk.student_logits


class Compared(DivergenceTerm):
    """A subclass that reads logits after the gradient of its base."""

    def values(self, chunk):
        return super().values(chunk) + chunk.student_logits.square().sum(-1)

    def values_and_gradient(self, chunk):
        values, gradient = super().values_and_gradient(chunk)
        logits = chunk.student_logits
        return values + logits.square().sum(-1), gradient + 2 * logits


KL, REVERSE = DivergenceTerm(ForwardKL()), softened(ReverseKL(), 2.0)
CE = CrossEntropy(TARGETS)


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize(
    "terms",
    {
        "label and teacher": [CE, KL],
        "teacher and label": [KL, CE],
        "two of the teacher": [KL, REVERSE],
        "three": [REVERSE, CE, KL],
        "a sum": [WeightedSum((KL, 0.5), (CE, WEIGHTS), (REVERSE, 2.0))],
        "a sum and one": [WeightedSum((KL, 0.5), (REVERSE, 2.0)), KL],
        "logits as a gradient": [LogitSquare(), KL],
        "a subclass": [CE, Compared(ForwardKL())],
    }.values(),
)
def test_terms_do_not_see_each_others_gradients(terms, chunk_rows):
    answer = answer_of("top_k", 3, 2.0)
    found = fused(terms, answer, chunk_rows=chunk_rows)
    assert_same(found, automatic(terms, answer))


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_what_is_only_looked_at_is_not_of_the_gradient(kind):
    """Terms without a weight come before and after the one that overwrites the logits."""
    answer = answer_of(kind)
    terms = [CE, DivergenceTerm(ForwardKL()), LogitSquare()]
    weights = [None, WEIGHTS, None]
    assert_same(fused(terms, answer, weights), automatic(terms, answer, weights))


def test_a_soft_cap_is_differentiated_at_the_logits():
    leaf = STUDENT.clone().requires_grad_()
    head = LazyHeadLogits(((leaf, torch.eye(V, dtype=leaf.dtype)),), scale=0.5, softcap=2.0)
    answer = answer_of("top_k")
    total, _ = weighted_sum(ChunkedPass(head, answer, [KL]), [WEIGHTS])
    total.backward()
    again = STUDENT.clone().requires_grad_()
    capped = 2.0 * (0.5 * again / 2.0).tanh()
    ids = answer.token_ids
    q = capped.softmax(-1)
    p = TEACHER.softmax(-1)
    sides = [
        torch.cat([x.gather(-1, ids), x.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1)
        for x in (q, p)
    ]
    expected = ((sides[1] * (sides[1] / sides[0]).log()).sum(-1) * WEIGHTS).sum()
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-11, atol=1e-13)
