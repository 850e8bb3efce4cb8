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


def refuse_together(reason: str | None, device: torch.device) -> None:
    """Refuse on every process what one of them refuses, which would leave the others waiting.

    Args:
        reason: Of this process; None for none.
        device: Of collectives.

    Raises:
        ValueError: If a process has a reason: its own, or the first other one with its process.
    """
    if not any_process(reason is not None, device):
        return
    reasons = gather_objects(reason)
    if reason is not None:
        raise ValueError(reason)
    rank, other = next((rank, other) for rank, other in enumerate(reasons) if other is not None)
    raise ValueError(f"process {rank}: {other}")


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
