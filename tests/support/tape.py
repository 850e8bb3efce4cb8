"""A stand-in for a CUDA graph on the CPU: operations are recorded and repeated on the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.looks import READS, SIZED_BY_VALUES

REFUSED = READS | SIZED_BY_VALUES | {"lift_fresh"}
"""What a CUDA device cannot record: reading a value, results whose shape depends on values, and tensors
made from numbers of the host."""


class Tape(TorchDispatchMode):
    """Repeats operations with the tensors and the numbers that they had when they were recorded.

    A number of the host that should have changed has not, and a tensor that another one has replaced is
    not seen: what depends on either comes out wrong, as it does on a CUDA device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self.warmed_up = self.recorded = self.replayed = 0
        self._done = False

    def warm_up(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self.warmed_up += 1
        return run()

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self.recorded += 1
        self._done = True
        with self:
            return run()

    def replay(self) -> None:
        self.replayed += 1
        if self._done:  # in recording, unlike on a CUDA device
            self._done = False
            return
        for function, args, kwargs, results in self.calls:
            for result, again in zip(results, tree_leaves(function(*args, **kwargs)), strict=True):
                if result is not None:
                    result.copy_(again)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        )
        if name in REFUSED or masks:
            raise RuntimeError(f"{name} cannot be recorded")
        kwargs = kwargs or {}
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        out = func(*args, **kwargs)
        # Where a result is a view of what was given, it is there without a copy.
        results = [
            x if is_tensor(x) and x.untyped_storage().data_ptr() not in given else None
            for x in tree_leaves(out)
        ]
        self.calls.append((func, args, kwargs, results))
        return out


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
