"""Checkpoints that all processes write to one directory."""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import safe_globals

from lightning_kd.checkpoints import compare_shapes, explained, unsafe
from lightning_kd.strategies.pieces import shapes

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's variable for code that asks for pickle."""

_SHAPES = "weights.json"
"""Shapes of all weights, so that those of another model are noticed before they are loaded."""


def readable_checkpoint(path: Path) -> Path:
    """The checkpoint, or what it was to replace when the process was killed between two renamings."""
    old = _old(path)
    return old if not path.exists() and old.exists() else path


@contextmanager
def replacing(strategy: Strategy, path: Path) -> Iterator[Path]:
    """A directory to write to, which takes the place of ``path`` when all processes have written."""
    fresh, old = path.with_name(f"{path.name}.fresh"), _old(path)
    if strategy.is_global_zero:
        shutil.rmtree(fresh, ignore_errors=True)
    strategy.barrier("checkpoint_begins")
    yield fresh
    strategy.barrier("checkpoint_written")
    if strategy.is_global_zero:
        (fresh / _SHAPES).write_text(json.dumps(_shapes(strategy)))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    strategy.barrier("checkpoint_in_place")


@contextmanager
def read_safely(
    strategy: Strategy, path: Path, weights_only: bool | None, classes: Sequence[type] = ()
) -> Iterator[None]:
    """While this is open, nothing in a directory is executed when it is read.

    torch and DeepSpeed read some of their files with pickle as it is, unless they are forced.

    Args:
        strategy: Has the model that the weights are for.
        path: The directory.
        weights_only: False where the user trusts it with everything.
        classes: Harmless ones that may be in it, besides tensors and plain values.

    Raises:
        ValueError: If something in it would be executed, or it is of another model.
    """
    if (path / _SHAPES).exists():
        with explained(path / _SHAPES):
            saved = json.loads((path / _SHAPES).read_text())
        compare_shapes(saved, _shapes(strategy))
    if weights_only is False:
        yield
        return
    index = path / ".metadata"
    if index.exists():
        with explained(index), index.open("rb") as file:
            _DescriptionsOnly(file).load()
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise unsafe(path, error) from error
    except CheckpointException as error:  # not even an Exception
        (first, _), *_ = error.failures.values()
        raise unsafe(path, first) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


class _DescriptionsOnly(pickle.Unpickler):
    """Reads torch's index of shards: its own data classes and enumerations, of plain values."""

    _MODULES = ("builtins", "collections", "pathlib", "torch")
    _KNOWN = (set, tuple, OrderedDict, torch.Size, torch.serialization._get_layout)

    def find_class(self, module: str, name: str) -> Any:
        # Looked at first, because looking it up imports its module.
        if module.partition(".")[0] in self._MODULES:
            found = super().find_class(module, name)
            if found in self._KNOWN or isinstance(found, torch.dtype) or _describes(found):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _describes(found: Any) -> bool:
    """Is it a path, or a data class or enumeration of torch's checkpoints?"""
    if not isinstance(found, type):
        return False
    of_torch = found.__module__.startswith("torch.distributed.")
    return issubclass(found, PurePath) or (
        of_torch and (is_dataclass(found) or issubclass(found, Enum))
    )


def _shapes(strategy: Strategy) -> dict[str, list[int]]:
    assert strategy.lightning_module is not None  # the trainer has connected it
    return shapes(strategy.lightning_module)


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")
