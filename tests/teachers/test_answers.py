"""Divergences over k tokens and a tail: against NumPy, finite differences and the dense value."""

import numpy as np
import pytest
import scipy.special
import torch

from lightning_kd.divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    ReverseKL,
    available_divergences,
    make_divergence,
)
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    MaterializedLogits,
    TeacherEntropy,
    TokenLogProbs,
    TopK,
    evaluate_no_grad,
    weighted_sum,
)
from lightning_kd.models import DenseLogits

N, V = 5, 9
STEP = 1e-6


class PearsonChiSquare(Divergence):
    """One that the library does not have, without a closed form."""

    def value(self, student_log_probs, teacher_log_probs):
        return (2 * teacher_log_probs - student_log_probs).exp().sum(-1) - 1


DIVERGENCES = {name: make_divergence(name) for name in available_divergences()}
DIVERGENCES["a user's own"] = PearsonChiSquare()


def logits(seed, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = logits(0), logits(1)


def top_k(k, teacher=TEACHER):
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    return TopK(ids, log_probs)


def numpy_events(z, ids, temperature=1.0):
    """Probabilities of the tokens and what is left of 1, as a logarithm."""
    z = z / temperature
    q = np.exp(z - z.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    known = np.take_along_axis(q, ids, -1)
    return np.log(np.concatenate([known, 1 - known.sum(-1, keepdims=True)], -1))


def frozen(divergence, student, teacher):
    """The divergence; of an adaptive one with the weight that it has here."""
    if not isinstance(divergence, AdaptiveKL):
        return divergence
    forward, reverse = (kl(student, teacher) for kl in (ForwardKL(), ReverseKL()))
    share = (divergence(student, teacher) - reverse) / (forward - reverse)
    return lambda s, t: share * ForwardKL()(s, t) + (1 - share) * ReverseKL()(s, t)


def fused(token_term, answer, student=STUDENT):
    """Values and gradient in the student's logits, by the chunked pass."""
    leaf = student.clone().requires_grad_()
    head = LazyHeadLogits(((leaf, torch.eye(V, dtype=student.dtype)),))
    small = ChunkedPass(head, answer, [token_term], 2 * V * 8 * 2)
    total, values = weighted_sum(small, [torch.ones(N, dtype=torch.float64)])
    total.backward()
    return values[0], leaf.grad


def dense(token_term, answer, student=STUDENT):
    """The same by automatic differentiation of materialized logits."""
    leaf = student.clone().requires_grad_()
    ones = [torch.ones(N, dtype=torch.float64)]
    total, values = DenseLogits().evaluate(MaterializedLogits(leaf), answer, [token_term], ones)
    total.backward()
    return values[0], leaf.grad


@pytest.mark.parametrize("path", [fused, dense])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_over_k_tokens_and_a_tail(name, k, temperature, path):
    divergence, answer = DIVERGENCES[name], top_k(k)
    ids = answer.token_ids.numpy()
    theirs = torch.from_numpy(numpy_events(TEACHER.numpy(), ids))

    def events(z):
        return torch.from_numpy(numpy_events(z, ids, temperature))

    z = STUDENT.numpy()
    formula = frozen(divergence, events(z), theirs)
    slope = np.zeros_like(z)
    for token in range(V):
        moved = np.zeros_like(z)
        moved[:, token] = STEP
        there, back = (formula(events(z + sign * moved), theirs) for sign in (1, -1))
        slope[:, token] = ((there - back) / (2 * STEP)).numpy()
    values, gradient = path(DivergenceTerm(divergence, student_temperature=temperature), answer)
    torch.testing.assert_close(values, divergence(events(z), theirs), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.from_numpy(slope), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", [fused, dense])
@pytest.mark.parametrize("k", [V - 1, V])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_but_one_are_the_whole_distribution(name, k, path):
    token_term = DivergenceTerm(DIVERGENCES[name])
    whole = path(token_term, FullDistribution((MaterializedLogits(TEACHER),)))
    for found, expected in zip(path(token_term, top_k(k)), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_more_tokens_tell_more_and_none_tell_too_much(divergence):
    token_term = DivergenceTerm(divergence)
    bounds = torch.stack([fused(token_term, top_k(k))[0] for k in range(1, V + 1)])
    assert (bounds.diff(dim=0) > -1e-12).all()
    assert (bounds[0] < bounds[-1] - 1e-3).any()


@pytest.mark.parametrize("path", [fused, dense])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", available_divergences())
def test_a_tail_of_nothing_leaves_all_finite(name, dtype, path):
    """Either side's tail is smaller than the dtype can tell from 0."""
    peaked, bulk = torch.zeros(N, V, dtype=dtype), torch.zeros(N, V, dtype=dtype)
    peaked[:, :2] = 200.0
    bulk[:, 2:] = 60.0
    for student, teacher in ((peaked, peaked), (bulk, peaked), (peaked, logits(3).to(dtype))):
        answer = top_k(2 if teacher is peaked else 4, teacher)
        answer.check(N, V)
        values, gradient = path(DivergenceTerm(DIVERGENCES[name]), answer, student)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_a_term_that_needs_all_tokens_is_refused():
    with pytest.raises(ValueError, match=r"every token.*does not answer full_distribution"):
        fused(TeacherEntropy(), top_k(3))
    single = TokenLogProbs(torch.zeros(N, dtype=torch.float64))
    with pytest.raises(ValueError, match="one token at each position"):
        fused(DivergenceTerm(ForwardKL()), single)
    with pytest.raises(ValueError, match="cannot be tempered"):
        fused(DivergenceTerm(ForwardKL(), teacher_temperature=2.0), top_k(3))


GOOD = top_k(3)
NAN = torch.full((N, 3), torch.nan)


@pytest.mark.parametrize(
    ("answer", "message"),
    {
        "too few": (TopK(GOOD.token_ids[1:], GOOD.log_probs[1:]), "4 positions, but 5 are scored"),
        "ragged": (TopK(GOOD.token_ids, GOOD.log_probs[:, :2]), "positions, k"),
        "twice": (TopK(GOOD.token_ids[:, [0, 0, 1]], GOOD.log_probs), "must be different"),
        "unknown": (TopK(GOOD.token_ids + V, GOOD.log_probs), "from 0 to 8"),
        "nan": (TopK(GOOD.token_ids, NAN), "no log-probabilities"),
        "probabilities": (TopK(GOOD.token_ids, GOOD.log_probs.exp()), "no log-probabilities"),
        "too much": (TopK(GOOD.token_ids, 0 * GOOD.log_probs), "add up to 3.0000"),
        "single": (TokenLogProbs(torch.zeros(N + 1)), "6 positions, but 5 are scored"),
        "square": (TokenLogProbs(torch.zeros(N, 1)), "one for each"),
        "infinite": (TokenLogProbs(torch.full((N,), -torch.inf)), "no log-probabilities"),
        "floats": (TopK(GOOD.token_ids.float(), GOOD.log_probs), "are torch.float32; give int64"),
        "rounded off": (TopK(GOOD.token_ids, GOOD.log_probs.long()), "torch.int64; they must be"),
        "a rounded token": (TokenLogProbs(torch.zeros(N).long()), "torch.int64; they must be"),
        "too little": (
            TopK(top_k(V).token_ids, top_k(V).log_probs - 1),
            f"all {V} tokens, and their probabilities add up to 0.3679",
        ),
    }.values(),
)
def test_answers_to_another_question_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        answer.check(N, V)
    GOOD.check(N, V)


def test_rounded_answers_are_taken():
    rounded = TopK(GOOD.token_ids, GOOD.log_probs.bfloat16())
    rounded.check(N, V)
    found = evaluate_no_grad(
        ChunkedPass(MaterializedLogits(STUDENT), rounded, [DivergenceTerm(ForwardKL())])
    )
    torch.testing.assert_close(
        found[0], fused(DivergenceTerm(ForwardKL()), GOOD)[0], rtol=0.1, atol=0.02
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-12])
def test_a_small_tail_in_half_precision_keeps_its_probability(tail, tail_dtype, dtype):
    named = torch.tensor([[0.7, 0.3]], dtype=torch.float64) * (1 - tail)
    # Of one token; the others have none.
    softened = tail**0.5 / (named.sqrt().sum().item() + tail**0.5)
    tails = {
        t: torch.tensor([share], dtype=torch.float64).log().to(tail_dtype)
        for t, share in ((1.0, tail), (2.0, softened))
    }
    answer = TopK(torch.tensor([[0, 1]]), named.log().to(dtype), tails)
    answer.check(1, 50)
    # The logarithm is rounded, to 8 bits at worst.
    for temperature, share in ((1.0, tail), (2.0, softened)):
        found = answer.at(temperature, 50)[0, -1].item()
        assert found == pytest.approx(np.log(share), rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [50_000, 10**9])
def test_named_tokens_in_half_precision_keep_their_share_of_a_flat_distribution(
    width, tail_dtype, dtype
):
    log_probs = torch.full((1, 2), -np.log(width)).to(dtype)
    tails = {1.0: torch.tensor([np.log1p(-2 / width)]).to(tail_dtype)}
    answer = TopK(torch.tensor([[0, 1]]), log_probs, tails)
    answer.check(1, width)
    assert answer.at(1.0, width)[0, 0].item() == pytest.approx(-np.log(width), rel=2**-8)
    undeclared = TopK(torch.tensor([[0, 1]]), log_probs)
    assert undeclared.at(1.0, width)[0, 0].item() == pytest.approx(-np.log(width), rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 65, 512, 3080, 128_000])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_honest_probabilities_are_taken_however_their_type_rounds_them(scale, width, dtype):
    draws = torch.Generator().manual_seed(0)
    u = scale * torch.randn(3, width, generator=draws, dtype=torch.float64)
    ids = torch.arange(width).expand(3, width)
    whole = u.log_softmax(-1)
    TopK(ids, whole.to(dtype)).check(3, width)
    k = width - 1
    tail = {1.0: whole[:, k:].logsumexp(-1).to(dtype)}
    TopK(ids[:, :k], whole[:, :k].to(dtype), tail).check(3, width)
    for wrong in (0.2, -0.2):
        with pytest.raises(ValueError, match="add up to"):
            TopK(ids, (whole + wrong).to(dtype).clamp_max(0)).check(3, width)
        with pytest.raises(ValueError, match="add up to"):
            TopK(ids, whole + wrong / 10).check(3, width)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_that_are_left_out_join_the_tail(temperature):
    """As an answer of fewer tokens has it, from the whole distribution by NumPy."""
    tempered = scipy.special.log_softmax(TEACHER.numpy() / temperature, axis=-1)
    whole = scipy.special.log_softmax(TEACHER.numpy(), axis=-1)
    best = np.argsort(-whole, axis=-1)

    def beyond(k, log_probs):
        return scipy.special.logsumexp(np.take_along_axis(log_probs, best[:, k:], -1), axis=-1)

    ids = torch.from_numpy(best[:, :6].copy())
    tails = {temperature: torch.from_numpy(beyond(6, tempered))}
    six = TopK(ids, torch.from_numpy(whole).gather(-1, ids), tails)
    three = six.most_likely(3, V)
    three.check(N, V)
    assert three.token_ids.tolist() == best[:, :3].tolist()
    for t, log_probs in ((1.0, whole), (temperature, tempered)):
        np.testing.assert_allclose(three.tail_log_probs[t], beyond(3, log_probs), rtol=1e-9)
        named = np.take_along_axis(log_probs, best[:, :3], -1)
        np.testing.assert_allclose(three.at(t, V)[:, :3], named, rtol=1e-9)
    assert six.most_likely(6, V) is six
    with pytest.raises(ValueError, match="k is 7; the teacher knows 6 tokens at each position"):
        six.most_likely(7, V)
