"""The host beside its device: copies that it does not wait for, and what it knows without asking.

Work on an accelerator is queued. Each value that the host reads, and each tensor whose size depends on
values (``x[mask]``, ``nonzero``), makes it wait until all that was queued is done.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_IN_STEP = frozenset({"cpu"})
"""Types of devices whose values are there as soon as they are asked for."""


def is_queued(device: torch.device) -> bool:
    """Return whether the host would wait for a value of a device.

    Example:
        >>> is_queued(torch.device("cpu")), is_queued(torch.device("cuda"))
        (False, True)
    """
    return device.type not in _IN_STEP


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, where the copy is queued like other work.

    From the CPU to CUDA it goes through pinned memory: from other memory the host would wait. To the
    CPU the host waits, for it may read the copy at once.

    Example:
        >>> tensor = torch.ones(2)
        >>> to_device(tensor, torch.device("cpu")) is tensor
        True
    """
    ready: Tensor = pinned(tensor, device)
    return ready.to(device, non_blocking=is_queued(device))


def pinned(values: Any, device: torch.device) -> Any:
    """Return a tensor, or a collection of some, from which copies to a device can be queued."""
    if device.type != "cuda":
        return values
    return apply_to_collection(values, Tensor, _pinned)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


class LateCopy:
    """Hands on each of a row of tensors to the host when the next one comes.

    Meanwhile the device has gone on with other work, so that the host hardly waits. Where it does not
    wait anyway, on the CPU, each tensor is handed on at once.

    Example:
        >>> late = LateCopy()
        >>> late.exchange(torch.tensor(1.0)), late.flush()
        (tensor(1.), None)
    """

    def __init__(self) -> None:
        self._under_way: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, tensor: Tensor) -> Tensor | None:
        """Begin to copy a tensor, and return the copy of the one before; None if there is none."""
        if not is_queued(tensor.device):
            return tensor
        before = self.flush()
        event = None
        if tensor.is_cuda:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor = copy.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._under_way = tensor, event
        return before

    def flush(self) -> Tensor | None:
        """Return the copy that is under way; None if there is none."""
        if self._under_way is None:
            return None
        (copy, event), self._under_way = self._under_way, None
        if event is not None:
            event.synchronize()
        return copy.cpu()


class Noted:
    """What is known of tensors, for as long as each lives and is as it was."""

    def __init__(self) -> None:
        self._notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor) -> Any:
        """Return what is known of a tensor; None if nothing is, or the tensor has changed."""
        if tensor.is_inference():  # which does not tell when it is changed
            return None
        version, note = self._notes.get(tensor, (None, None))  # type: ignore[no-untyped-call]
        return note if version == tensor._version else None

    def set(self, tensor: Tensor, note: object) -> None:
        """Note something."""
        if not tensor.is_inference():
            self._notes[tensor] = (tensor._version, note)


class KnownPlaces:
    """Where tensors satisfy a condition: ``(N,)`` of flat indices.

    Args:
        condition: Returns a mask of a tensor's shape.

    Example:
        >>> known = KnownPlaces(lambda tensor: tensor > 0)
        >>> known.of(torch.tensor([[0, 5], [6, 0]]))
        tensor([1, 2])
    """

    def __init__(self, condition: Callable[[Tensor], Tensor]) -> None:
        self.condition = condition
        self._found = Noted()
        _KNOWN.append(self)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the places; the host waits for them where they are not known."""
        places: Tensor | None = self._found.get(tensor)
        if places is None:
            # What an evaluation finds may be trained on, as an index that is saved for backward.
            with torch.inference_mode(False):
                places = self.condition(tensor).flatten().nonzero()[:, 0]
            self._found.set(tensor, places)
        return places

    def hand_on(self, tensor: Tensor, copy: Tensor) -> None:
        """Know of a copy what is known of a tensor."""
        places = self._found.get(tensor)
        if places is not None:
            with torch.inference_mode(False):
                self._found.set(copy, to_device(places, copy.device))


_KNOWN: list[KnownPlaces] = []
_ON_HOST = Noted()
_ORIGINS = Noted()


def origin_of(tensor: Tensor) -> object:
    """Return what a tensor has in common with its copies that :func:`note_copy` was told of.

    So two tensors are known to be equal, without a look at their values.

    Example:
        >>> tensor = torch.ones(2)
        >>> copy = clone(tensor)
        >>> origin_of(copy) is origin_of(tensor)
        True
        >>> copy[0] = 2
        >>> origin_of(copy) is origin_of(tensor)
        False
    """
    origin = _ORIGINS.get(tensor)
    if origin is None:
        origin = object()
        _ORIGINS.set(tensor, origin)
    return origin


def note_copy(tensor: Tensor, copy: Tensor) -> None:
    """Know of a copy, on any device, what is known of a tensor."""
    if copy is not tensor:
        _ORIGINS.set(copy, origin_of(tensor))
        for known in _KNOWN:
            known.hand_on(tensor, copy)


def note_values(tensor: Tensor, copy: Tensor) -> None:
    """Know the values of a copy from the tensor on the host, ``(N,)``."""
    _ON_HOST.set(copy, tensor.tolist())


def values_of(tensor: Tensor) -> list[Any]:
    """Return the values of a tensor, ``(N,)``; the host waits for those that were not noted.

    Example:
        >>> values_of(torch.tensor([2, 3]))
        [2, 3]
    """
    known: list[Any] | None = _ON_HOST.get(tensor)
    return tensor.tolist() if known is None else known


def clone(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, of which as much is known."""
    copy = tensor.clone()
    note_copy(tensor, copy)
    return copy
