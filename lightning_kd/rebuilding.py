"""Constructor arguments as plain data, and objects from such data again."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PretrainedConfig

from lightning_kd.functions import import_name, is_nameless
from lightning_kd.resuming import Plain, Resumable

_CLASS, _ARGUMENTS = "class_path", "init_args"
"""As configuration files have them."""

_CALLED_LATER = (Optimizer, LRScheduler, ReduceLROnPlateau)
"""Classes that are given to a constructor to be called with weights or an optimizer."""


class NotPlainError(Exception):
    """An object that a file cannot hold."""


def to_plain(value: Any) -> Plain:
    """Return plain data that :func:`from_plain` makes an equal object of.

    Raises:
        NotPlainError: If there is none: of a model in memory, or a function without a name.

    Example:
        >>> import torch
        >>> to_plain(partial(torch.optim.SGD, lr=0.1))
        {'class_path': 'torch.optim.sgd.SGD', 'init_args': {'lr': 0.1}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, type) and issubclass(value, _CALLED_LATER):
        return _of_class(value, {})
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return _of_class(value.func, value.keywords)
    if isinstance(value, Resumable) and not getattr(value, "is_given", False):
        return _of_class(type(value), value._arguments)
    if isinstance(value, PretrainedConfig):
        return to_plain({"model_type": value.model_type, **value.to_dict()})
    if is_dataclass(value) and not isinstance(value, type | Resumable):
        return _of_class(type(value), {f.name: getattr(value, f.name) for f in fields(value)})
    raise NotPlainError(f"a {type(value).__name__}")


def from_plain(data: Plain) -> Any:
    """Return what :func:`to_plain` made data of.

    Only classes of this library, of torch's optimizers and schedules, and those that derive from
    them are made, and only where they have been imported already: a file imports nothing, and does
    not decide that code which comes with a model is run.

    Raises:
        ValueError: If the data names another class, or trusts code.

    Example:
        >>> from_plain({"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}}).keywords
        {'lr': 0.1}
    """
    if isinstance(data, list):
        return [from_plain(item) for item in data]
    if not isinstance(data, dict):
        return data
    if not isinstance(data.get(_CLASS), str):
        return {name: from_plain(item) for name, item in data.items()}
    found = _class_named(data[_CLASS])
    if (data.get(_ARGUMENTS) or {}).get("trust_remote_code"):
        raise ValueError(
            f"the checkpoint has a {found.__name__} with trust_remote_code, which would run code that "
            "comes with the model, and a file cannot decide that: if you trust it, give the argument "
            f"yourself: a {found.__name__} that says so"
        )
    arguments = {n: from_plain(v) for n, v in (data.get(_ARGUMENTS) or {}).items()}
    return partial(found, **arguments) if issubclass(found, _CALLED_LATER) else found(**arguments)


def plain_arguments(
    arguments: Mapping[str, Any], instead: Mapping[str, Any]
) -> tuple[dict[str, Plain], list[str]]:
    """Return the arguments of a constructor that plain data can tell, and the names of the others.

    Args:
        arguments: The arguments.
        instead: Values to take for those that are not plain.
    """
    told: dict[str, Plain] = {}
    others: list[str] = []
    for name, value in arguments.items():
        for candidate in (value, *([instead[name]] if name in instead else [])):
            try:
                told[name] = to_plain(candidate)
                break
            except NotPlainError:
                continue
        else:
            others.append(name)
    return told, others


def _of_class(found: type, arguments: Mapping[str, Any]) -> dict[str, Plain]:
    if is_nameless(found) and "<" in found.__qualname__:
        raise NotPlainError(f"a local class {found.__qualname__}")
    return {_CLASS: import_name(found), _ARGUMENTS: to_plain(arguments)}


def _class_named(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    own = isinstance(found, type) and (
        issubclass(found, (Resumable, *_CALLED_LATER))
        or (is_dataclass(found) and found.__module__.startswith("lightning_kd."))
    )
    if not own:
        raise ValueError(
            f"the checkpoint was written with {path}, which is no class of this library that has been "
            "imported here; import your own before, or give the argument that it was for"
        )
    kind: type = found
    return kind


def missing(name: str) -> Callable[..., Any]:
    """Return a function in the place of one that could not be saved, which says so when called.

    Args:
        name: The argument.
    """

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{name} of the saved run was a function without a name, which a checkpoint cannot hold: "
            f"give load_from_checkpoint(..., {name}=...) to train"
        )

    return refuse
