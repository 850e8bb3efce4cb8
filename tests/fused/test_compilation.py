"""Compiled against float64 formulas, and against automatic differentiation of all logits.

Most tests run the traced graph without making code of it, which takes a compiler half a minute each.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch._dynamo.utils import counters

from lightning_kd.divergences import Divergence, available_divergences, make_divergence
from lightning_kd.divergences.interpolated import InterpolatedDivergence
from lightning_kd.divergences.log_space import expm1_
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    FullDistribution,
    LazyHeadLogits,
    MaterializedLogits,
    TeacherEntropy,
    TokenTerm,
    Top1Agreement,
    TopK,
    TopKOverlap,
    WeightedSum,
    compilation,
    evaluate_no_grad,
    fused_linear_divergence,
    per_token,
    weighted_sum,
)
from lightning_kd.models import DenseLogits, FusedLogits

V, H = 23, 5
EVERY = available_divergences()
pytestmark = pytest.mark.slow


class Cubic(Divergence):
    """A user's own: no closed form."""

    def value(self, student_log_probs, teacher_log_probs):
        gap = (teacher_log_probs - student_log_probs).clamp(-5, 5)
        return (teacher_log_probs.exp() * gap.abs() ** 3).sum(-1)


class Branching(Divergence):
    """A user's own that decides by value, which no compiler can trace."""

    def value(self, student_log_probs, teacher_log_probs):
        power = 2 if student_log_probs.max() < 1 else 3
        return (teacher_log_probs.exp() - student_log_probs.exp()).abs().pow(power).sum(-1)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    """What a process has compiled, tried and said stays in it."""
    torch._dynamo.reset()
    counters.clear()
    compilation._compiled.cache_clear()
    for kept in (compilation._given_up, compilation._tried, compilation._said):
        kept.clear()
    monkeypatch.setattr(compilation, "BACKEND", "eager")


def draw(n, dtype=torch.float64, excluded=0.0):
    """Hidden states tied to the head, the teacher's logits, labels and weights of which some are 0."""
    draws = torch.Generator().manual_seed(n)
    weight = torch.randn(V, H, generator=draws, dtype=dtype).requires_grad_()
    teacher = 2 * torch.randn(n, V, generator=draws, dtype=dtype)
    out = torch.rand(n, V, generator=draws) < excluded
    labels = torch.randint(0, V, (n,), generator=draws)
    weights = torch.rand(n, generator=draws, dtype=torch.float64)
    weights[::4] = 0
    return weight, labels, teacher.masked_fill(out, -torch.inf), weights


def passed(weight, labels, teacher, terms, mode, *, rows=6, **head):
    answer = FullDistribution((MaterializedLogits(teacher),))
    student = LazyHeadLogits(((weight[labels], weight),), **head)
    return ChunkedPass(student, answer, terms, weight.element_size() * V * 2 * rows, mode)


def dense(weight, labels, teacher, divergence, temperatures, scale, softcap):
    own = softcap * torch.tanh(scale * (weight[labels] @ weight.T) / softcap)
    log_probs = (own / temperatures[0]).log_softmax(-1)
    return divergence(log_probs, (teacher / temperatures[1]).log_softmax(-1)), own.log_softmax(-1)


def number_of_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.7)])
@pytest.mark.parametrize("divergence", [*EVERY, Cubic()], ids=str)
def test_values_and_gradients_are_those_of_all_logits(divergence, temperatures):
    """With a soft cap, a tied head, chunks of unequal length, weights of 0 and a second loss term."""
    divergence = make_divergence(divergence)
    tempered = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
    for n in (17, 9):
        weight, labels, teacher, weights = draw(n)
        terms = [DivergenceTerm(divergence, **tempered), CrossEntropy(labels), Entropy()]
        chunks = passed(weight, labels, teacher, terms, "always", scale=0.6, softcap=4.0)
        total, values = weighted_sum(chunks, [weights, 2 * weights, None])
        value, log_probs = dense(weight, labels, teacher, divergence, temperatures, 0.6, 4.0)
        nats = -log_probs.gather(1, labels[:, None])[:, 0]
        expected = torch.stack([value, nats, -(log_probs.exp() * log_probs).sum(-1)])
        torch.testing.assert_close(values, expected.detach(), rtol=1e-11, atol=1e-12)
        (found,) = torch.autograd.grad(total, weight)
        exact = (weights * value + 2 * weights * nats).sum()
        if divergence.name == "adaptive_kl":  # holds its weights constant
            exact = per_token(
                passed(weight, labels, teacher, terms, "never", scale=0.6, softcap=4.0)
            )
            exact = (weights * exact[0] + 2 * weights * exact[1]).sum()
        (gradient,) = torch.autograd.grad(exact, weight)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    assert number_of_graphs() == 1


def test_forward_kl_by_its_formula():
    weight, labels, teacher, weights = draw(13, excluded=0.3)
    chunks = passed(weight, labels, teacher, [DivergenceTerm("forward_kl")], "always")
    total, values = weighted_sum(chunks, [weights])
    w, u = weight.detach().numpy(), teacher.numpy()
    q, p = (np.exp(log_softmax(z, axis=-1)) for z in (w[labels] @ w.T, u))
    np.testing.assert_allclose(values[0], rel_entr(p, q).sum(-1), rtol=1e-12)
    slope = weights.numpy()[:, None] * (q - p)
    of_weight = slope.T @ w[labels]
    np.add.at(of_weight, labels.numpy(), slope @ w)
    np.testing.assert_allclose(torch.autograd.grad(total, weight)[0], of_weight, atol=1e-12)
    assert number_of_graphs() == 1


@pytest.mark.parametrize("divergence", ["generalized_jsd", "skew_kl", "total_variation"])
def test_tokens_that_the_teacher_excludes(divergence):
    weight, labels, teacher, weights = draw(11, excluded=0.4)
    term = DivergenceTerm(divergence)
    total, values = weighted_sum(passed(weight, labels, teacher, [term], "always"), [weights])
    log_probs = (weight[labels] @ weight.T).log_softmax(-1)
    expected = make_divergence(divergence)(log_probs, teacher.log_softmax(-1))
    torch.testing.assert_close(values[0], expected.detach(), rtol=1e-11, atol=1e-12)
    found, exact = (
        torch.autograd.grad(loss, weight)[0] for loss in (total, (weights * expected).sum())
    )
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


def test_a_weight_of_0_takes_no_infinite_gradient():
    weight, labels, teacher, weights = draw(9, excluded=0.4)  # the reverse KL is infinite
    term = DivergenceTerm("reverse_kl")
    total, values = weighted_sum(passed(weight, labels, teacher, [term], "always"), [0 * weights])
    assert values.isinf().all()
    assert total == 0
    assert not torch.autograd.grad(total, weight)[0].any()


def test_no_length_makes_new_code():
    """Nor where a chunk begins, nor one row alone, nor as many positions as a part has."""
    for n in (6, 7, 23, 12, 1, 2, 3, 40, 6):
        weight, labels, teacher, weights = draw(n)
        terms = [DivergenceTerm("generalized_jsd"), CrossEntropy(labels)]
        gradients = []
        for mode in ("always", "never"):
            chunks = passed(weight, labels, teacher, terms, mode)
            total, _ = weighted_sum(chunks, [weights, weights])
            gradients += torch.autograd.grad(total, weight)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    assert number_of_graphs() == 1


def test_a_share_that_moves_makes_no_new_code():
    """A target between student and teacher is at another place in every step."""
    for step, n in enumerate((9, 14, 9, 12)):
        weight, labels, teacher, weights = draw(n)
        share = torch.tensor(step / 3, dtype=torch.float64)
        terms = [DivergenceTerm(InterpolatedDivergence(make_divergence("reverse_kl"), share))]
        gradients = []
        for mode in ("always", "never"):
            total, _ = weighted_sum(passed(weight, labels, teacher, terms, mode), [weights])
            gradients += torch.autograd.grad(total, weight)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    assert number_of_graphs() == 1


def test_all_that_is_logged_is_one_graph_with_the_loss():
    n = 14
    weight, labels, teacher, weights = draw(n)
    looked_at = [Entropy(), TeacherEntropy(), Top1Agreement(), DivergenceTerm("reverse_kl")]
    loss = WeightedSum((DivergenceTerm("forward_kl"), weights), (CrossEntropy(labels), 0.5))
    terms = [loss, *looked_at, TopKOverlap(3)]
    both = []
    for mode in ("always", "never"):
        chunks = passed(weight, labels, teacher, terms, mode)
        total, values = weighted_sum(chunks, [torch.ones(n), *[None] * 5])
        both.append((values, torch.autograd.grad(total, weight)[0]))
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-11)
    assert number_of_graphs() == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluations_are_compiled_too(context):
    weight, labels, teacher, _ = draw(14)
    with context():
        values = [
            evaluate_no_grad(passed(weight, labels, teacher, [Entropy(), Top1Agreement()], mode))
            for mode in ("always", "never")
        ]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    assert number_of_graphs() == 1


def test_values_with_any_gradient():
    weight, labels, teacher, _ = draw(14)
    term = DivergenceTerm("reverse_kl")
    found, exact = (
        torch.autograd.grad(
            per_token(passed(weight, labels, teacher, [term], mode)).square().sum(), weight
        )[0]
        for mode in ("always", "never")
    )
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


def test_narrow_operands_have_wide_logits():
    weight, labels, teacher, weights = draw(14, torch.float32)
    weight = weight.detach().bfloat16().requires_grad_()
    both = []
    for mode in ("always", "never"):
        chunks = passed(weight, labels, teacher, [DivergenceTerm("generalized_jsd")], mode)
        total, values = weighted_sum(chunks, [weights])
        both.append((values, torch.autograd.grad(total, weight)[0]))
    assert both[0][0].dtype == torch.float32
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_traced_is_evaluated_without_and_said_once():
    weight, labels, teacher, weights = draw(14)
    terms = [DivergenceTerm("total_variation"), DivergenceTerm(Branching())]
    with pytest.warns(UserWarning, match=r"DivergenceTerm of Branching\(\) is not compiled: it "):
        found = weighted_sum(passed(weight, labels, teacher, terms, "always"), [weights, weights])
    before = number_of_graphs()
    again = weighted_sum(passed(weight, labels, teacher, terms, "always"), [weights, weights])
    exact = weighted_sum(passed(weight, labels, teacher, terms, "never"), [weights, weights])
    gradients = [torch.autograd.grad(total, weight)[0] for total, _ in (found, again, exact)]
    for own, values in zip(gradients, (found[1], again[1], exact[1]), strict=True):
        torch.testing.assert_close(own, gradients[-1], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(values, exact[1], rtol=1e-11, atol=1e-12)
    assert number_of_graphs() == before


def test_a_sparse_answer_leaves_the_other_terms_compiled():
    weight, labels, teacher, weights = draw(14)
    best = teacher.log_softmax(-1).topk(4, -1)
    answer = TopK(best.indices, best.values)
    both = []
    for mode in ("never", "always"):
        student = LazyHeadLogits(((weight[labels], weight),))
        terms = [DivergenceTerm("forward_kl"), CrossEntropy(labels)]
        chunks = ChunkedPass(student, answer, terms, 8 * V * 6, mode)
        if mode == "always":
            with pytest.warns(UserWarning, match="terms that read a TopK of the teacher are not"):
                total, values = weighted_sum(chunks, [weights, weights])
        else:
            total, values = weighted_sum(chunks, [weights, weights])
        both.append((values, torch.autograd.grad(total, weight)[0]))
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-11)
    assert number_of_graphs() == 1


class Squares(TokenTerm):
    """Its gradient is the logits themselves, and it decides by value, so that it is not compiled."""

    def values(self, chunk):
        return 0.5 * chunk.student_logits.square().sum(-1)

    def values_and_gradient(self, chunk):
        if float(chunk.student_logits.sum()) > 1e30:
            raise ValueError("far too large")
        return self.values(chunk), chunk.student_logits


@pytest.mark.filterwarnings("ignore:Squares is not compiled")
def test_a_gradient_that_is_the_logits_is_not_overwritten_by_compiled_code():
    weight, labels, teacher, weights = draw(14)
    terms = [DivergenceTerm("forward_kl"), Squares()]
    logits = weight[labels] @ weight.T
    exact = weights * (
        make_divergence("forward_kl")(logits.log_softmax(-1), teacher.log_softmax(-1))
        + 0.5 * logits.square().sum(-1)
    )
    (expected,) = torch.autograd.grad(exact.sum(), weight)
    for _ in range(2):  # the first falls back on the way
        total, _ = weighted_sum(
            passed(weight, labels, teacher, terms, "always"), [weights, weights]
        )
        (found,) = torch.autograd.grad(total, weight)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_more_settings_than_pytorch_makes_code_for(mode, monkeypatch, recwarn):
    """Said by name, and refused where everything is to be compiled."""
    monkeypatch.setattr(compilation, "pays", lambda device, planned_logits: True)
    weight, labels, teacher, weights = draw(14)

    def evaluate(beta):
        divergence = make_divergence("generalized_jsd", beta=beta)
        chunks = passed(weight, labels, teacher, [DivergenceTerm(divergence)], mode)
        with torch._dynamo.config.patch(recompile_limit=3):
            return weighted_sum(chunks, [weights])[1][0]

    for beta in (0.2, 0.3, 0.4):
        evaluate(beta)
    if mode == "always":
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"always, and Div.*GeneralizedJSD.* over 3 settings"
            ):
                evaluate(0.5)
        evaluate(0.2)  # for which there is code
        return
    exact = make_divergence("generalized_jsd", beta=0.5)(
        (weight[labels] @ weight.T).log_softmax(-1), teacher.log_softmax(-1)
    )
    torch.testing.assert_close(evaluate(0.5), exact, rtol=1e-11, atol=1e-12)
    evaluate(0.6)
    (line,) = [str(w.message) for w in recwarn if "without a compiler" in str(w.message)]
    assert "GeneralizedJSD" in line
    assert "raise torch._dynamo.config.recompile_limit" in line


class Whole(TokenTerm):
    """A wrong one: one number for all positions."""

    def values(self, chunk):
        return chunk.student().sum()


def test_the_error_of_a_term_is_its_own():
    weight, labels, teacher, _ = draw(14)
    with pytest.raises(ValueError, match=r"Whole\.values has returned shape \(\)"):
        evaluate_no_grad(passed(weight, labels, teacher, [Whole()], "always"))


def without_a_compiler(graph, inputs):
    raise RuntimeError("no compiler here")


def refusing(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", without_a_compiler)
    monkeypatch.setattr(compilation, "pays", lambda device, planned_logits: True)


def test_without_a_compiler_one_line_is_said_and_nothing_else_changes(monkeypatch, recwarn):
    refusing(monkeypatch)
    both = []
    for mode in ("auto", "auto", "never"):
        weight, labels, teacher, weights = draw(14)
        chunks = passed(weight, labels, teacher, [DivergenceTerm("forward_kl")], mode)
        total, values = weighted_sum(chunks, [weights])
        both.append((values, torch.autograd.grad(total, weight)[0]))
    assert torch.equal(both[0][0], both[2][0])
    assert torch.equal(both[0][1], both[2][1])
    (line,) = [str(w.message) for w in recwarn if "compiler" in str(w.message)]
    assert line == "the fused evaluation goes on without a compiler: RuntimeError: no compiler here"


def test_always_is_refused_without_a_compiler(monkeypatch):
    refusing(monkeypatch)
    weight, labels, teacher, weights = draw(14)
    chunks = passed(weight, labels, teacher, [DivergenceTerm("forward_kl")], "always")
    with pytest.raises(
        ValueError, match=r"compile is always, and no code .* on cpu: .*compiler here"
    ):
        weighted_sum(chunks, [weights])


def test_auto_compiles_nothing_on_a_cpu():
    weight, labels, teacher, weights = draw(14)
    weighted_sum(passed(weight, labels, teacher, [CrossEntropy(labels)], "auto"), [weights])
    assert number_of_graphs() == 0


def test_another_word_is_refused():
    one, two = torch.zeros(3, 2), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"unknown compile 'on'"):
        fused_linear_divergence(one, two, one, two, compile="on")
    with pytest.raises(ValueError, match=r"unknown compile 'on'; choose one of \('auto', 'always'"):
        FusedLogits(compile="on")
    with pytest.raises(TypeError, match=r"DenseLogits\(\) takes no arguments"):
        DenseLogits(compile="always")


CODE = """
import torch
from lightning_kd.fused import compilation
from tests.fused.test_compilation import *
compilation.pays = lambda device, planned_logits: True
weight, labels, teacher, weights = draw(14)
weighted_sum(passed(weight, labels, teacher, [CrossEntropy(labels)], "auto"), [weights])
"""


@pytest.mark.processes
def test_a_machine_without_a_cpp_compiler_goes_on(monkeypatch):
    monkeypatch.setenv("CXX", "/nothing/here")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=sys.path[0] or ".",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("the fused evaluation goes on without a compiler: InvalidCxxComp") == 1


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_real_code_keeps_its_digits_near_agreement():
    """Where both sides nearly agree, a difference of 1 and an exponential would be all round-off."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 64, generator=draws, dtype=torch.float64)
    near = logits + 1e-4 * torch.randn(4, 64, generator=draws, dtype=torch.float64)
    exact = [log_softmax(side.numpy(), -1) for side in (near, logits)]
    sides = [torch.tensor(side, dtype=torch.float32) for side in exact]
    own, other = (side.double().numpy() for side in sides)
    mean = np.logaddexp(own, other) - np.log(2)
    jsd = (rel_entr(np.exp(own), np.exp(mean)) + rel_entr(np.exp(other), np.exp(mean))).sum(-1) / 2
    # The paper's formula; its terms cancel to second order, which float64 bears.
    powers = [np.exp(0.9 * other) * 0.2 / 0.9, np.exp(0.9 * own) * 0.7 / 0.9]
    alpha_beta = (sum(powers) - np.exp(0.2 * other + 0.7 * own)).sum(-1) / (0.2 * 0.7)
    names = ("generalized_jsd", "alpha_beta")

    def evaluate(student, teacher, x):
        values = [
            make_divergence(name).value_and_logit_gradient(student, teacher)[0] for name in names
        ]
        return [*values, expm1_(x.clone())]

    x = -torch.logspace(-9, 2, 80)
    *values, differences = torch.compile(evaluate)(*sides, x)
    np.testing.assert_allclose(differences, np.expm1(x.double().numpy()), rtol=1e-6)
    # Rounded to float32 the probabilities do not add up to 1, which the formulas see differently.
    np.testing.assert_allclose(values[0], jsd, rtol=1e-2)
    np.testing.assert_allclose(values[1], alpha_beta, rtol=1e-2)


@pytest.mark.processes
def test_real_code_equals_the_formulas(monkeypatch):
    """And is the same for a row whatever the number of rows that it was made for."""
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    rows = {}
    for lengths in ((17, 9), (9, 17)):
        for n in lengths:
            weight, labels, teacher, weights = draw(n, torch.float32)
            terms = [DivergenceTerm("generalized_jsd"), DivergenceTerm(Cubic()), Entropy()]
            chunks = passed(weight, labels, teacher, terms, "always", softcap=5.0)
            total, values = weighted_sum(chunks, [weights, weights, None])
            assert torch.equal(values, rows.setdefault(n, values))
            own = 5 * torch.tanh(weight.double()[labels] @ weight.double().T / 5)
            own, other = own.log_softmax(-1), teacher.double().log_softmax(-1)
            jsd, cubic = make_divergence("generalized_jsd")(own, other), Cubic()(own, other)
            torch.testing.assert_close(values[0].double(), jsd.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(values[1].double(), cubic.detach(), rtol=1e-5, atol=1e-6)
            (found,) = torch.autograd.grad(total, weight)
            (exact,) = torch.autograd.grad((weights * (jsd + cubic)).sum(), weight)
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        assert number_of_graphs() == 1
        torch._dynamo.reset()
        counters.clear()
        compilation._compiled.cache_clear()
