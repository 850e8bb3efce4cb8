"""Small collectives, which every process calls together with the others."""

from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is true on any process."""
    return max_over_processes(int(flag), device) > 0


def max_over_processes(number: int, device: torch.device) -> int:
    """Return the largest number that any process gives."""
    if not torch.distributed.is_initialized():
        return number
    given = torch.tensor(float(number), device=device)
    torch.distributed.all_reduce(given, torch.distributed.ReduceOp.MAX)
    return int(given.item())


def gather_objects(value: _T) -> list[_T]:
    """Return the values of all processes, by rank.

    Args:
        value: Anything that can be pickled. Tensors belong on the CPU: they arrive on the device that
            they were on, which may be the sender's own.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
