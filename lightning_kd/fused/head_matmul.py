"""The three matrix products of an output head, in float32 or wider whatever the operands are."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 16 * 2**20
"""Size of the part of a narrow weight that is widened at a time."""


def project(states: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out (+)= states weight^T``: ``(n, H), (V, H) -> (n, V)``."""
    if _is_native(states, weight, out):
        _product(states, weight.t(), out, add)
    else:
        states = states.to(out.dtype)
        for tile in _tiles(weight):
            _product(states, weight[tile].to(out.dtype).t(), out[:, tile], add)


def to_states(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = gradient weight``: ``(n, V), (V, H) -> (n, H)``."""
    if _is_native(gradient, weight, out):
        narrow, scale = _narrowed(gradient, weight.dtype)
        _product(narrow, weight, out, add=False)
        if scale is not None:
            out.div_(scale)
    else:
        for number, tile in enumerate(_tiles(weight)):
            _product(gradient[:, tile], weight[tile].to(out.dtype), out, add=number > 0)


def to_weight(gradient: Tensor, states: Tensor, out: Tensor, *, add: bool) -> None:
    """``out (+)= gradient^T states``: ``(n, V), (n, H) -> (V, H)``."""
    if _is_native(gradient, states, out):
        narrow, scale = _narrowed(gradient, states.dtype)
        if scale is not None and add:
            out.mul_(scale)
        _product(narrow.t(), states, out, add)
        if scale is not None:
            out.div_(scale)
    else:
        _product(gradient.t(), states.to(out.dtype), out, add)


def _narrowed(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient in a narrower type, and the power of two that it was multiplied by for it, if any.

    Float16 ends at 6e-8, which a softmax over a large vocabulary reaches by itself, and the more so
    the smaller the weight of its token. The largest entry is brought to 8,192 or more, far below the
    largest number. The other types have the range of float32.
    """
    if dtype != torch.float16 or not gradient.numel():
        return gradient.to(dtype), None
    # A tensor, for which the host does not wait.
    largest = gradient.abs().amax()
    scale = (torch.frexp(largest).mantissa / largest * 2.0**14).clamp(max=2.0**60)
    scale = torch.where((largest > 0) & largest.isfinite(), scale, 1.0)
    return (gradient * scale).to(dtype), scale


def _is_native(first: Tensor, second: Tensor, out: Tensor) -> bool:
    """Return whether a kernel multiplies these types and accumulates in the type of ``out``."""
    if second.dtype == out.dtype:
        return first.dtype == out.dtype
    return out.is_cuda and out.dtype == torch.float32 and first.dtype in (out.dtype, second.dtype)


def _product(first: Tensor, second: Tensor, out: Tensor, add: bool) -> None:
    if first.dtype == out.dtype:
        if add:
            out.addmm_(first, second)
        else:
            torch.mm(first, second, out=out)
    elif add:
        torch.addmm(out, first, second, out_dtype=out.dtype, out=out)
    else:
        torch.mm(first, second, out_dtype=out.dtype, out=out)


def _tiles(weight: Tensor) -> Iterator[slice]:
    size = max(1, TILE_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], size):
        yield slice(start, start + size)
