"""The fused divergence against automatic differentiation of all logits at once, in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd.divergences import Divergence, available_divergences, make_divergence
from lightning_kd.fused import chunked_pass, fused_linear_divergence, head_matmul

N, HIDDEN, TEACHER_HIDDEN = 13, 5, 7


class ChiSquare(Divergence):
    """A user's own, without a closed form."""

    def value(self, student_log_probs, teacher_log_probs):
        return (2 * teacher_log_probs - student_log_probs).exp().sum(-1) - 1


EVERY = [*available_divergences(), ChiSquare()]


def heads(student_vocabulary=11, teacher_vocabulary=11, bias=True, dtype=torch.float64, n=N):
    """Hidden states, weights and biases of both sides; the student's want gradients."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    sides = []
    for vocabulary, hidden in (
        (student_vocabulary, HIDDEN),
        (teacher_vocabulary, TEACHER_HIDDEN),
    ):
        tensors = [draw(n, hidden), draw(vocabulary, hidden), draw(vocabulary) if bias else None]
        sides.append(tensors)
    for tensor in sides[0]:
        if tensor is not None:
            tensor.requires_grad_()
    return sides


def fused(student, teacher, **options):
    return fused_linear_divergence(
        *student[:2], *teacher[:2], student_bias=student[2], teacher_bias=teacher[2], **options
    )


def dense(student, teacher, divergence, temperatures=(1.0, 1.0)):
    """The definition: all logits, and automatic differentiation."""
    width = min(student[1].shape[0], teacher[1].shape[0])
    log_probs = []
    for (hidden, weight, bias), temperature in zip((student, teacher), temperatures, strict=True):
        logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        log_probs.append((logits[..., :width] / temperature).log_softmax(-1))
    return make_divergence(divergence)(*log_probs)


def gradients(loss, student):
    wanted = [tensor for tensor in student if tensor is not None and tensor.requires_grad]
    kept = torch.autograd.grad(loss, wanted, retain_graph=True)
    # The last backward pass may work in place; it must find what one that keeps its graph has found.
    before = [gradient.clone() for gradient in kept]
    last = torch.autograd.grad(loss, wanted)
    for first, second, saved in zip(kept, last, before, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, saved)
    return last


def assert_equal(actual, expected, tolerance=1e-12):
    scale = max(1.0, *(tensor.abs().max().item() for tensor in expected if tensor.numel()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("widths", [(11, 11), (11, 9), (9, 11)])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.5, 0.7)])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_equals_all_logits_at_once(divergence, temperatures, widths, mode):
    student, teacher = heads(*widths, bias=widths != (11, 11))
    generator = torch.Generator().manual_seed(3)
    scored = torch.rand(N, generator=generator) > 0.3
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    result = fused(
        student,
        teacher,
        divergence=divergence,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        scored=scored,
        weights=weights,
        mode=mode,
        chunk_bytes=8 * min(widths) * 2 * 3,
    )
    expected = dense(student, teacher, divergence, temperatures).where(scored, 0.0)
    torch.testing.assert_close(result.values, expected, rtol=1e-12, atol=1e-13)
    assert_equal(
        gradients(3 * result.total, student), gradients(3 * (weights * expected).sum(), student)
    )


@pytest.mark.parametrize("rows", [1, 4, 12, 13, 100])
def test_no_cut_into_chunks_changes_anything(rows, monkeypatch):
    student, teacher = heads()
    monkeypatch.setattr(chunked_pass, "_CACHE_BYTES", 8 * 11 * 2)
    whole = dense(student, teacher, "generalized_jsd")
    result = fused(student, teacher, divergence="generalized_jsd", chunk_bytes=8 * 11 * 2 * rows)
    torch.testing.assert_close(result.values, whole, rtol=1e-12, atol=1e-13)
    assert_equal(gradients(result.total, student), gradients(whole.sum(), student))


class HeadGradients(TorchDispatchMode):
    """Operations that return a tensor of the head's shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize(("factor", "scaled"), [(3.0, ["mul_"]), (1.0, [])])
def test_the_backward_pass_makes_no_second_gradient_of_the_head(factor, scaled):
    student, teacher = heads(bias=False)
    total = fused(student, teacher).total
    with HeadGradients(student[1].shape) as made:
        (total * factor).backward()
    assert [name for name in made.names if name not in {"detach", "view"}] == scaled
    expected = dense(student, teacher, "forward_kl").sum() * factor
    assert_equal([student[1].grad], torch.autograd.grad(expected, [student[1]]))


def test_a_head_that_is_large_allows_chunks_as_large(monkeypatch):
    lengths = []

    class Entries(Divergence):
        def value(self, student_log_probs, teacher_log_probs):
            lengths.append(len(student_log_probs))
            return ChiSquare().value(student_log_probs, teacher_log_probs)

    monkeypatch.setattr(chunked_pass, "CHUNK_BYTES", 8 * 11 * 2)
    states, weight = (torch.ones(n, 16, dtype=torch.float64, requires_grad=True) for n in (N, 11))
    fused_linear_divergence(states, weight, states, weight, divergence=Entries())
    # Float64 logits of both sides at 6 positions take 3/4 of what the head's gradient does.
    assert lengths == [5, 5, 3]
    lengths.clear()
    with torch.no_grad():
        fused_linear_divergence(states, weight, states, weight, divergence=Entries())
    assert lengths == [1] * 13  # no gradient, no reason


def test_positions_over_several_axes():
    student, teacher = heads(n=12)
    for side in (student, teacher):
        side[0] = side[0].reshape(3, 4, -1)
    result = fused(student, teacher)
    expected = dense(student, teacher, "forward_kl")
    assert result.values.shape == (3, 4)
    assert_equal(gradients(result.total, student), gradients(expected.sum(), student))


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_nothing_scored_is_a_zero_with_a_gradient(mode):
    student, teacher = heads()
    result = fused(student, teacher, scored=torch.zeros(N, dtype=torch.bool), mode=mode)
    assert result.total.item() == 0
    for gradient in gradients(result.total, student):
        assert not gradient.any()


# The adaptive KL holds its weights constant, so that its gradient is not the slope of its value.
@pytest.mark.slow
@pytest.mark.parametrize("divergence", [d for d in EVERY if d != "adaptive_kl"], ids=str)
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_finite_differences(divergence, mode):
    student, teacher = heads(6, 6, n=3)

    def total(*tensors):
        return fused(list(tensors), teacher, divergence=divergence, mode=mode, chunk_bytes=96).total

    assert torch.autograd.gradcheck(total, student)


def test_recomputing_takes_any_gradient_of_the_values():
    student, teacher = heads()
    values = fused(student, teacher, divergence="reverse_kl", mode="recompute").values
    expected = dense(student, teacher, "reverse_kl")
    assert_equal(
        gradients((values**2).sum() + values[3].exp(), student),
        gradients((expected**2).sum() + expected[3].exp(), student),
    )


def test_what_is_not_scored_is_not_looked_at():
    student, teacher = heads()
    scored = torch.arange(N) % 2 == 0
    with torch.no_grad():
        student[0][~scored] = math.nan
        teacher[0][~scored] = math.inf
    result = fused(student, teacher, scored=scored)
    assert result.total.isfinite()
    of_hidden, *others = gradients(result.total, student)
    assert not of_hidden[~scored].any()
    assert all(gradient.isfinite().all() for gradient in (of_hidden, *others))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that anything gives, in numbers."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


def test_all_logits_are_never_there():
    student, teacher = heads(500, 500, dtype=torch.float32, n=64)
    with Largest() as largest:
        result = fused(student, teacher, divergence="generalized_jsd", chunk_bytes=8 * 500 * 8)
        result.total.backward()
    assert largest.numbers <= 8 * 500
    with Largest() as largest:
        dense(student, teacher, "generalized_jsd").sum().backward()
    assert largest.numbers >= 64 * 500


def test_no_gradient_is_made_that_nobody_wants(monkeypatch):
    made = []
    for name in ("to_states", "to_weight"):
        function = getattr(head_matmul, name)
        monkeypatch.setattr(
            f"lightning_kd.fused.lazy_logits.{name}",
            lambda *a, _f=function, _n=name, **k: (made.append(_n), _f(*a, **k))[1],
        )
    student, teacher = heads()
    with torch.no_grad():
        fused(student, teacher)
    fused([tensor.detach() for tensor in student], teacher)
    assert made == []
    frozen_head = [student[0], *(tensor.detach() for tensor in student[1:])]
    fused(frozen_head, teacher).total.backward()
    assert set(made) == {"to_states"}


def test_a_second_derivative_is_refused():
    student, teacher = heads()
    total = fused(student, teacher).total
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(total, student, create_graph=True)


def test_a_kept_graph_gives_the_same_twice():
    student, teacher = heads()
    total = fused(student, teacher).total
    first, second = (
        torch.autograd.grad(2 * total, student, retain_graph=keep) for keep in (True, False)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_several_factors_at_once():
    student, teacher = heads(bias=False)
    total, factors = fused(student, teacher).total, torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = torch.autograd.grad(total, student[:2], factors, is_grads_batched=True)
    exact = dense(student, teacher, "forward_kl").sum()
    for factor, *of_factor in zip(factors, *found, strict=True):
        assert_equal(of_factor, gradients(exact * factor, student))
        exact = dense(student, teacher, "forward_kl").sum()


def test_a_small_divisor_flushes_nothing_in_half_precision():
    """One over the count is applied to the gradient in float32, not to logits in float16."""
    student, teacher = heads(dtype=torch.float16)
    wide = [tensor.detach().double().requires_grad_() for tensor in student]
    expected = gradients(dense(wide, teacher, "forward_kl").sum() * 2**16 / 1e6, wide)
    loss = fused(student, teacher).total / 1e6
    for scaled, exact in zip(gradients(loss * 2**16, student), expected, strict=True):
        torch.testing.assert_close(scaled.double(), exact, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_bfloat16_inputs_keep_their_gradient(noise):
    """Near convergence (JSD 0.003 at the smaller noise) rounded logits lose a tenth of it."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(256, 64, generator=generator),
        torch.randn(800, 64, generator=generator),
    )
    teacher = [hidden.bfloat16(), (weight / 4).bfloat16(), None]
    moved = hidden + noise * torch.randn(256, 64, generator=generator)
    student = [moved.bfloat16().requires_grad_(), (weight / 4).bfloat16().requires_grad_(), None]
    expected = gradients(dense(student, teacher, "generalized_jsd").sum(), student)
    result = fused(student, teacher, divergence="generalized_jsd", chunk_bytes=2**20)
    for got, exact in zip(gradients(result.total, student), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact.double()).norm() <= 5e-3 * exact.double().norm()


@pytest.mark.parametrize("of_states", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16, torch.float16])
def test_operands_may_have_two_types(of_states, of_weight):
    """As under autocast, where the head stays in float32."""
    (hidden, weight, _), teacher = heads(bias=False, dtype=torch.float32)
    student = [hidden.detach().to(of_states), weight.detach().to(of_weight)]
    student = [*(tensor.requires_grad_() for tensor in student), None]
    exact = dense(student, teacher, "forward_kl")
    result = fused(student, teacher)
    torch.testing.assert_close(result.values.double(), exact, rtol=1e-5, atol=1e-6)
    expected = gradients(exact.sum(), student)
    for got, right in zip(gradients(result.total, student), expected, strict=True):
        assert got.dtype == right.dtype
        assert (got.double() - right.double()).norm() <= 5e-3 * right.double().norm()


def test_autocast_does_not_round_the_logits():
    student, teacher = heads(dtype=torch.float32)
    alone = fused(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        under = fused(student, teacher)
    assert torch.equal(under.values, alone.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "eager"}, "choose one of fused, recompute"),
        ({"student_temperature": 0.0}, "must be positive"),
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\)"),
        ({"scored": torch.ones(2, N, dtype=torch.bool)}, "scored has shape"),
        ({"divergence": "kl"}, "choose one of"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    student, teacher = heads()
    with pytest.raises(ValueError, match=message):
        fused(student, teacher, **options)


def test_wrong_shapes_are_refused():
    student, teacher = heads()
    with pytest.raises(ValueError, match=r"student_hidden has shape \(13, 5\)"):
        fused_linear_divergence(student[0], teacher[1], *teacher[:2])
    with pytest.raises(ValueError, match="both must see the same tokens"):
        fused_linear_divergence(student[0][:4], student[1], *teacher[:2])
