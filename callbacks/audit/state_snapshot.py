"""Snapshot of a module's state that can be restored in place."""

import pickle
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

# A training step is not expected to change these, or they do not belong to the module.
_SKIPPED_TYPES = (
    *(L.Trainer, L.LightningDataModule, Callback, Logger, Strategy, Optimizer, LRScheduler),
    *(Dataset, DataLoader, PreTrainedTokenizerBase, type, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, str, bytes, int, float, complex, torch.dtype, torch.device),
)
_LIBRARIES = {"builtins", "abc", "typing", "lightning", "lightning_fabric", "torch", "transformers"}
_BACK_REFERENCES = {"_trainer", "_fabric"}


class GlobalGenerators:
    """Global random generators of Python, NumPy and torch, with CUDA's if CUDA is in use."""

    def __init__(self) -> None:
        self._saved = self._read()

    def restore(self) -> None:
        """Set the generators to the saved states."""
        python, numpy, cpu, cuda = self._saved
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    def reseed(self, seed: int) -> None:
        """Seed the generators."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def fingerprint(self) -> bytes:
        """Return the current states in a form that can be compared."""
        python, numpy, cpu, cuda = self._read()
        return pickle.dumps((python, numpy, *(state.numpy().tobytes() for state in (cpu, *cuda))))

    def _read(self) -> tuple[Any, Any, Tensor, list[Tensor]]:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if used else []
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


class StateSnapshot:
    """Snapshot of everything reachable from a module that its training step may change.

    Saved are the module's weights, buffers, attributes and modes, those of models that it holds
    without registering them, the numbers and containers of its class, and all objects, containers,
    arrays, tensors and generators that can be reached from these. They are restored in place, so that
    containers shared with other objects stay shared.

    Args:
        module: The module.
        others: Further objects, such as the parameter groups of an optimizer.
    """

    def __init__(self, module: nn.Module, *others: object) -> None:
        self.cannot_restore: list[str] = []
        """Attributes that advance when they are read and cannot be restored: iterators, files."""
        self._restorers: list[Callable[[], object]] = []
        self._versions: list[tuple[str, Tensor, int]] = []
        self._seen: dict[int, object] = {}
        registered = [*module.parameters(), *module.buffers()]
        self._registered = {id(tensor) for tensor in registered}
        self._gradients = [(p, p.grad, p.requires_grad) for p in module.parameters()]
        self._random = GlobalGenerators()
        self._generators: list[Any] = []
        self._pending: list[tuple[str, Any]] = [(type(module).__name__, module)]
        self._pending += [(type(other).__name__, other) for other in others]
        for cls in type(module).__mro__:
            if cls.__module__.split(".")[0] not in _LIBRARIES:
                self._save_class(cls)
        while self._pending:
            self._save(*self._pending.pop())

    def restore(self) -> None:
        """Restore all state, gradients and random generators."""
        for restorer in self._restorers:
            restorer()
        for parameter, gradient, requires in self._gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires)
        self._random.restore()

    def reseed(self, seed: int) -> None:
        """Seed every random generator, including those of the module."""
        self._random.reseed(seed)
        for generator in self._generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                bits: Any = generator.bit_generator
                bits.state = type(bits)(seed).state
            else:
                generator.seed(seed)

    def random_fingerprint(self) -> bytes:
        """Return the states of all random generators, which differ if numbers were drawn."""
        own = [_state(generator) for generator in self._generators]
        return self._random.fingerprint() + pickle.dumps(own)

    def changed_weights(self) -> list[str]:
        """Return the names of unregistered weights that were changed in place and not restored."""
        return [name for name, tensor, version in self._versions if tensor._version != version]

    def _save(self, name: str, value: Any) -> None:
        if value is None or isinstance(value, _SKIPPED_TYPES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # a reference, so that its id is not reused
        if isinstance(value, Tensor):
            self._save_tensor(name, value)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                copied = value.copy()
                self._restorers.append(lambda: value.__setitem__(..., copied))
        elif isinstance(value, dict):
            self._save_dict(name, value)
        elif isinstance(value, list | deque | set | bytearray):
            self._save_container(name, value)
        elif isinstance(value, tuple | frozenset):
            self._pending += [(f"{name}[{k}]", item) for k, item in enumerate(value)]
        elif not self._save_generator(value):
            if isinstance(value, Iterator):
                self.cannot_restore.append(name)
            else:
                self._save_object(name, value)

    def _save_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_inference() or _overlaps(tensor):
            return
        held = isinstance(tensor, nn.Parameter) and id(tensor) not in self._registered
        if held or (isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()):
            # Weights of another model, such as a teacher, may be too large for a copy.
            self._versions.append((name, tensor, tensor._version))
            return
        copied = tensor.detach().clone()
        self._restorers.append(lambda: tensor.data.copy_(copied))

    def _save_dict(self, name: str, value: dict[Any, Any]) -> None:
        items = list(value.items())
        kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict

        def restore() -> None:
            now = list(value.items())
            if len(now) != len(items) or any(
                a[0] is not b[0] or a[1] is not b[1] for a, b in zip(now, items, strict=True)
            ):
                kind.clear(value)
                kind.update(value, items)

        self._restorers.append(restore)
        self._pending += [(f"{name}.{key}", v) for key, v in items if key not in _BACK_REFERENCES]

    def _save_container(self, name: str, value: Any) -> None:
        items = list(value)

        def restore() -> None:
            now = list(value)
            if len(now) != len(items) or any(a is not b for a, b in zip(now, items, strict=True)):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(items)

        self._restorers.append(restore)
        self._pending += [(f"{name}[{k}]", item) for k, item in enumerate(items)]

    def _save_generator(self, value: Any) -> bool:
        """Save the state of a random generator; return False for any other object."""
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._restorers.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            python = value.getstate()
            self._restorers.append(lambda: value.setstate(python))
        elif isinstance(value, np.random.RandomState):
            legacy = value.get_state()
            self._restorers.append(lambda: value.set_state(legacy))
        elif isinstance(value, np.random.Generator):
            bits, drawn = value.bit_generator, value.bit_generator.state
            self._restorers.append(lambda: setattr(bits, "state", drawn))
        else:
            return False
        self._generators.append(value)
        return True

    def _save_object(self, name: str, value: Any) -> None:
        if isinstance(getattr(value, "__dict__", None), dict):
            self._save(name, value.__dict__)
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                member = cls.__dict__.get(slot)
                if isinstance(member, types.MemberDescriptorType) and hasattr(value, slot):
                    self._save_slot(f"{name}.{slot}", value, member)

    def _save_slot(self, name: str, owner: object, member: types.MemberDescriptorType) -> None:
        saved = member.__get__(owner)
        self._restorers.append(lambda: member.__set__(owner, saved))
        self._pending.append((name, saved))

    def _save_class(self, cls: type) -> None:
        for name, value in list(vars(cls).items()):
            if name.startswith("__") or isinstance(value, property):
                continue
            if isinstance(value, int | float | str | tuple | None):
                self._restorers.append(lambda n=name, v=value: _reset(cls, n, v))  # type: ignore[misc]
            elif isinstance(value, Tensor | dict | list | set | deque | np.ndarray):
                self._restorers.append(lambda n=name, v=value: _reset(cls, n, v))  # type: ignore[misc]
                self._pending.append((f"{cls.__name__}.{name}", value))


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.get_state()
    return state.numpy().tobytes() if isinstance(state, Tensor) else state


def _reset(cls: type, name: str, value: object) -> None:
    if vars(cls).get(name) is not value:
        setattr(cls, name, value)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory, as after ``expand``, which cannot be written to."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
