"""A counter of what the host waits for: values that it reads, tensors whose size depends on values."""

import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}
COPIES = {"cpu", "tolist", "numpy"}
"""To the host, of which the dispatcher sees nothing where the tensor is there already."""
GIVEN = {"tensor", "as_tensor", "new_tensor"}
"""To a device, of a number: out of memory that is not pinned. A tensor is copied with ``to``."""

OURS = ("lightning_kd", "torchmetrics")
"""Packages of which each copy to a device counts; others move what may be there already."""


class Looks:
    """Counts operations whose result the host waits for, on a GPU.

    Args:
        named: Functions that stand for all that they call.
    """

    def __init__(self, named: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.places: Counter[str] = Counter()
        self.named = named
        self._modes: list[Any] = []

    @property
    def count(self) -> int:
        return self.places.total()

    def add(self) -> None:
        self.places[place(self.named)] += 1

    def __enter__(self) -> Self:
        self._modes = [_Dispatched(self), _Called(self)]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Dispatched(TorchDispatchMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self.looks = looks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in {"index", "index_put", "index_put_"} and any(
            index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        )
        if name in READS | SIZED_BY_VALUES or masks:
            self.looks.add()
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self.looks = looks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        given = [*args[1:], (kwargs or {}).get("device")]
        to_device = name in GIVEN and given[-1] is not None
        if name == "to" and not (kwargs or {}).get("non_blocking", False):
            moves = any(isinstance(each, torch.device | str) for each in given)
            to_device = moves and place().startswith(("lightning_kd/", "torchmetrics/"))
        if (
            name in COPIES
            or to_device
            or (name == "new_tensor" and isinstance(args[0], torch.Tensor))
        ):
            self.looks.add()
        return func(*args, **(kwargs or {}))


def place(named: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """Return the file and function that asked: the innermost that is not torch's (optimizers are)."""
    found, frame = "", sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        parts = Path(code.co_filename).parts
        ours = "support" in parts and parts[-1] == "looks.py"
        of_torch = "torch" in parts and "optim" not in parts
        if code.co_name in named and "lightning_kd" in parts:
            return code.co_name
        if not found and not ours and not of_torch and not code.co_filename.startswith("<"):
            package = [name for name in OURS if name in parts]
            start = parts.index(package[0]) if package else -2
            found = f"{'/'.join(parts[start:])}:{code.co_name}"
        frame = frame.f_back
    return found
