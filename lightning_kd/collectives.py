"""Small collectives that every process calls together."""

import torch


def any_process(flag: bool, device: torch.device) -> bool:
    """Is the flag raised on any process? All of them ask together; a single one just knows."""
    return max_over_processes(int(flag), device) > 0


def max_over_processes(number: int, device: torch.device) -> int:
    """The highest number that any process gives. All of them ask together."""
    if not torch.distributed.is_initialized():
        return number
    given = torch.tensor(float(number), device=device)
    torch.distributed.all_reduce(given, torch.distributed.ReduceOp.MAX)
    return int(given.item())
