"""Options of the command line, as pages name them: ``--model.teacher.placement``."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_kd.callbacks
from lightning_kd import DistillationData, DistillationModule
from lightning_kd.callbacks import (
    HFExport,
    JsonlPredictions,
    NonFiniteGuard,
    OnPolicyGeneration,
)
from lightning_kd.preflight import Preflight

ROOTS: dict[str, type] = {
    "model": DistillationModule,
    "data": DistillationData,
    "trainer": L.Trainer,
    "on_policy": OnPolicyGeneration,
    "export": HFExport,
    "predictions": JsonlPredictions,
    "non_finite": NonFiniteGuard,
    "preflight": Preflight,
}
LEAVES = {"config", "seed_everything", "ckpt_path", "print_config"}
CALLBACKS = [
    *(getattr(lightning_kd.callbacks, name) for name in lightning_kd.callbacks.__all__),
    ModelCheckpoint,
    EarlyStopping,
]


def is_option(name: str) -> bool:
    """Whether ``fit`` has an option of this dotted name, with any class where one is chosen.

    Example:
        >>> [is_option(f"--model.{name}") for name in ("teacher.placement", "teacher.place", "lr")]
        [True, False, False]
    """
    first, *rest = name.removeprefix("--").removesuffix("+").split(".")
    if not rest:
        return first in LEAVES or first in ROOTS
    if first == "trainer" and rest[0] == "callbacks":
        classes = CALLBACKS
        rest = rest[1:]
        return not rest or _has(classes, rest)
    return first in ROOTS and _has(_choices(ROOTS[first]), rest)


def _has(classes: list[type], names: list[str]) -> bool:
    having = [cls for cls in classes if names[0] in inspect.signature(cls.__init__).parameters]
    if len(names) == 1 or not having:
        return bool(having) and names[0] not in {"self", "args", "kwargs"}
    notes = [_annotations(cls).get(names[0]) for cls in having]
    return any(_has(_choices(cls), names[1:]) for note in notes for cls in _classes(note))


def _annotations(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    except NameError:  # torch's own, imported for type checkers alone
        return {}


def _classes(note: Any) -> Iterator[type]:
    """The classes in an annotation; of what makes an optimizer or a schedule, those that are made."""
    if isinstance(note, type) and not isinstance(note, types.GenericAlias):
        yield note
        return
    for part in typing.get_args(note):
        if isinstance(part, list):  # what a callable takes
            continue
        yield from _classes(part)


def _choices(cls: type) -> list[type]:
    """A class and all that are derived from it."""
    found, waiting = [], [cls]
    while waiting:
        each = waiting.pop()
        if each in found or each.__module__ == "builtins":
            continue
        found.append(each)
        waiting += each.__subclasses__()
    return found
