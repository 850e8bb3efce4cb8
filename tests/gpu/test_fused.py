"""The fused evaluation against all logits in float64 on the CPU, by automatic differentiation."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.divergences import available_divergences, make_divergence
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DivergenceTerm,
    FullDistribution,
    LazyHeadLogits,
    fused_linear_divergence,
    weighted_sum,
)

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 37, 32, 48, 301
CHUNK_BYTES = 8 * VOCABULARY * 16
"""Chunks of 16 rows, the last one shorter."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
"""Of a gradient over its largest entry: products of narrow operands take a narrow gradient."""


def operands(dtype, device):
    """Hidden states and heads of student and teacher, a bias and weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    return {
        "student": draw(TOKENS, WIDTH).to(dtype).to(device),
        "student_weight": (2 * draw(VOCABULARY, WIDTH) / WIDTH**0.5).to(dtype).to(device),
        "student_bias": draw(VOCABULARY).to(dtype).to(device),
        "teacher": draw(TOKENS, TEACHER_WIDTH).to(dtype).to(device),
        "teacher_weight": (2 * draw(VOCABULARY, TEACHER_WIDTH) / TEACHER_WIDTH**0.5)
        .to(dtype)
        .to(device),
        "weights": torch.rand(TOKENS, generator=generator, dtype=torch.float64).to(device),
    }


def reference(given, names, loss_of):
    """The loss and the gradients of some operands, in float64 on the CPU."""
    exact = {name: tensor.detach().cpu().double() for name, tensor in given.items()}
    for name in names:
        exact[name].requires_grad_()
    loss = loss_of(exact)
    return loss.detach(), torch.autograd.grad(loss, [exact[name] for name in names])


def assert_close(tensor, exact, dtype):
    assert tensor.isfinite().all()
    error = (tensor.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("divergence", available_divergences())
def test_values_and_gradients_are_those_of_all_logits(device, divergence, dtype):
    given = operands(getattr(torch, dtype), device)
    names = ["student", "student_weight", "student_bias"]
    of = make_divergence(divergence)

    def dense(x):
        own = F.linear(x["student"], x["student_weight"], x["student_bias"]).log_softmax(-1)
        other = (x["teacher"] @ x["teacher_weight"].T).log_softmax(-1)
        return (x["weights"] * of(own, other)).sum()

    expected, gradients = reference(given, names, dense)
    for name in names:
        given[name].requires_grad_()
    result = fused_linear_divergence(
        given["student"],
        given["student_weight"],
        given["teacher"],
        given["teacher_weight"],
        student_bias=given["student_bias"],
        divergence=of,
        weights=given["weights"],
        chunk_bytes=CHUNK_BYTES,
    )
    # Also of narrow operands: the logits are float32 sums of exact products.
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-5)
    result.total.backward()
    for name, exact in zip(names, gradients, strict=True):
        assert given[name].grad.dtype == given[name].dtype
        assert_close(given[name].grad, exact, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_tied_head_with_scale_and_soft_cap(device, dtype):
    """The weight is embedding and head at once; two terms share the logits."""
    given = operands(getattr(torch, dtype), device)
    ids = torch.arange(TOKENS, device=device) * 5 % VOCABULARY
    divergence, scale, cap = make_divergence("generalized_jsd"), 0.7, 3.0

    def dense(x):
        own = x["student_weight"][ids.cpu()] @ x["student_weight"].T
        own = (cap * torch.tanh(scale * own / cap)).log_softmax(-1)
        other = (x["teacher"] @ x["teacher_weight"].T).log_softmax(-1)
        hard = -own.gather(-1, ids.cpu()[:, None])[:, 0]
        return (x["weights"] * divergence(own, other)).sum() + 0.5 * (x["weights"] * hard).sum()

    expected, (gradient,) = reference(given, ["student_weight"], dense)
    weight = given["student_weight"].requires_grad_()
    student = LazyHeadLogits(((weight[ids], weight),), scale=scale, softcap=cap)
    teacher = LazyHeadLogits(((given["teacher"], given["teacher_weight"]),))
    terms = [DivergenceTerm(divergence), CrossEntropy(ids)]
    chunked_pass = ChunkedPass(student, FullDistribution((teacher,)), terms, CHUNK_BYTES)
    total, _ = weighted_sum(chunked_pass, [given["weights"], 0.5 * given["weights"]])
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    assert_close(weight.grad, gradient, dtype)
