"""What an optimizer will keep, from weights without memory."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_kd.modules import DistillationModule

_LENGTHS = (32, 64)
"""Lengths of each side of the weights that an optimizer is measured on, if it needs numbers."""


def optimizer_bytes(
    module: DistillationModule, parameters: Sequence[Tensor], dtype: torch.dtype | None = None
) -> int:
    """Return bytes of the states that a module's optimizer will have, of parameters without memory.

    The optimizer takes a step on the meta device. One that needs numbers takes it on small weights
    with as many dimensions: what it keeps of a weight grows evenly with the length of each side, as
    numbers for each weight, row or column do, and so follows for any length.

    Args:
        module: Has the optimizer.
        parameters: The weights that train.
        dtype: Type of numbers that they will have. Defaults to theirs.
    """
    wide = [Parameter(torch.empty_like(p, device="meta", dtype=dtype)) for p in parameters]
    try:
        kept = _step(module, wide)
    except (RuntimeError, NotImplementedError):
        kinds = dict.fromkeys((p.ndim, p.dtype) for p in wide)
        small = {
            (kind, sides): Parameter(torch.zeros(sides, dtype=kind[1]))
            for kind in kinds
            for sides in product(_LENGTHS, repeat=kind[0])
        }
        kept = _step(module, list(small.values()))
        sizes = {which: _bytes_of(kept, weight) for which, weight in small.items()}
        return round(
            sum(
                _extended(
                    tuple(p.shape),
                    {
                        sides: sizes[kind, sides]
                        for kind, sides in sizes
                        if kind == (p.ndim, p.dtype)
                    },
                )
                for p in wide
            )
        )
    return sum(_bytes_of(kept, weight) for weight in wide)


def _extended(shape: tuple[int, ...], sizes: dict[tuple[int, ...], float]) -> float:
    """Return a size that is linear in each side, from those of all corners of a small box."""
    if not shape:
        return sizes[()]
    low, high = _LENGTHS
    first, second = (
        _extended(shape[1:], {sides[1:]: n for sides, n in sizes.items() if sides[0] == length})
        for length in _LENGTHS
    )
    return first + (second - first) * (shape[0] - low) / (high - low)


def _step(module: DistillationModule, parameters: Sequence[Parameter]) -> Optimizer:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = module.make_optimizer(parameters)
    optimizer.step()
    return optimizer


def _bytes_of(optimizer: Optimizer, parameter: Parameter) -> int:
    values = optimizer.state.get(parameter, {}).values()
    return sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))
