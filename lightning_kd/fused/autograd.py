"""Weighted sums and values per position whose gradients never see all logits at once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_kd.devices import is_queued
from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused.chunked_pass import ChunkedPass, Weights
from lightning_kd.fused.lazy_logits import LazyHeadLogits

# Whether the backward pass that runs keeps its graph; where PyTorch does not tell, it may.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def weighted_sum(chunked_pass: ChunkedPass, weights: Weights) -> tuple[Tensor, Tensor]:
    r"""The sum :math:`\sum_{k,i} w_{k,i} f_{k,i}` and the values :math:`f`, in one pass.

    Gradients of the sum are made in the forward pass, while a chunk's logits are there, and scaled
    in the backward pass; so the sum can be multiplied by anything (a loss scale, one over a count),
    but the values have no gradient of their own. Nothing of it is done where no gradient is wanted.

    Args:
        chunked_pass: What is computed, from a :class:`LazyHeadLogits` of the student.
        weights: Constants; float64 keeps the sum independent of its order.

    Returns:
        The sum, ``()``, and the values, ``(quantities, N)``, without a gradient.
    """
    student = chunked_pass.student
    if isinstance(student, LazyHeadLogits) and _differentiable(student.inputs):
        total, values = _WeightedSum.apply(chunked_pass, weights, *student.inputs)  # type: ignore[no-untyped-call]
        return total, values
    values = evaluate_no_grad(chunked_pass)
    return total_of(values, weights), values


def per_token(chunked_pass: ChunkedPass) -> Tensor:
    """The values, with gradients for whatever becomes of them: ``(quantities, N)``.

    No gradient is known in the forward pass, so the backward pass computes every chunk's logits a
    second time; that is half as many matrix products again as :func:`weighted_sum` needs.
    """
    student = chunked_pass.student
    if isinstance(student, LazyHeadLogits) and _differentiable(student.inputs):
        values: Tensor = _PerToken.apply(chunked_pass, *student.inputs)  # type: ignore[no-untyped-call]
        return values
    return evaluate_no_grad(chunked_pass)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chunked_pass: ChunkedPass, weights: Weights, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        with _no_autocast(inputs):
            values, gradients = chunked_pass.values_and_gradients(weights, ctx.needs_input_grad[2:])
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(values)
        return total_of(values, weights), values

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        saved = iter(ctx.saved_tensors)
        scaled = [
            _scaled(next(saved), of_total).to(dtype) if want else None
            for want, dtype in zip(ctx.needs_input_grad[2:], ctx.dtypes, strict=True)
        ]
        return None, None, *scaled


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunked_pass: ChunkedPass, *inputs: Tensor) -> Tensor:
        ctx.chunked_pass = chunked_pass
        ctx.save_for_backward(*inputs)
        with _no_autocast(inputs):
            return chunked_pass.values()

    @staticmethod
    def backward(ctx: Any, of_values: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        inputs, student = ctx.saved_tensors, ctx.chunked_pass.student
        assert isinstance(student, LazyHeadLogits)
        chunked_pass = replace(ctx.chunked_pass, student=student.with_inputs(inputs))
        with _no_autocast(inputs):
            _, gradients = chunked_pass.values_and_gradients(
                list(of_values.unbind()), ctx.needs_input_grad[1:]
            )
        narrowed = [
            gradient if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        return None, *narrowed


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the product; in place, which spares a second gradient of the head, where that is safe."""
    several = torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched
    if several or _keeps_graph():  # another backward pass finds what this one has found
        return gradient * factor
    # Elsewhere the comparison would wait for the device.
    looks = not is_queued(factor.device)
    return gradient if looks and factor == 1 else gradient.mul_(factor)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # only with create_graph, and the result would lack a term
        raise RuntimeError(
            "the fused evaluation has no second derivative: leave create_graph off, or use "
            "DenseLogits"
        )


def total_of(values: Tensor, weights: Weights) -> Tensor:
    """The weighted sum in float64, to which a weight of 0 adds 0 even of an infinite value."""
    total = values.new_zeros((), dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        if weight is not None:
            total = total + weighted(weight, value).sum(dtype=torch.float64)
    return total


@torch.no_grad()
def evaluate_no_grad(chunked_pass: ChunkedPass) -> Tensor:
    """The values, ``(quantities, N)``, and no gradient; the teacher alone will do."""
    with torch.autocast(chunked_pass.device.type, enabled=False):
        return chunked_pass.values()


def _no_autocast(inputs: Sequence[Tensor]) -> torch.autocast:
    return torch.autocast(inputs[0].device.type, enabled=False)


def _differentiable(inputs: Sequence[Tensor]) -> bool:
    # Inside a Function needs_input_grad says nothing of torch.no_grad.
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
