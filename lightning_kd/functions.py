"""Descriptions of functions as plain data, if no import finds them by name."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, timedelta
from functools import partial
from numbers import Number
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import lightning as L
import numpy as np
import torch

_VARIABLE_ARGUMENTS = (0x04, 0x08)
"""Flags of code that takes ``*args``, and of code that takes ``**kwargs``."""


def is_nameless(value: Any) -> bool:
    """Return whether no import finds a function or class: it is local, a lambda or of a script."""
    written_in = getattr(value, "__globals__", {}).get("__name__")  # a decorator may hide it
    return "__main__" in {written_in, value.__module__} or "<" in value.__qualname__


def import_name(value: Any) -> str:
    """Return the name that an import finds a function or class by."""
    named = value if hasattr(value, "__qualname__") else type(value)
    # A method of a C class, such as torch.Tensor.exp, knows its class alone.
    home = named if hasattr(named, "__module__") else named.__objclass__
    return f"{home.__module__}.{named.__qualname__}"


class FunctionDescription:
    """Description of a function by its code and by what it reads from elsewhere.

    Functions and classes that an import finds are known by their names, and so are the classes of
    objects that may hold anything. The bytecode is that of one version of Python, which is therefore
    told with it. Numbers are shown, all else is a digest: a table may be large, a text a secret.

    Args:
        describe: Describes what the library knows: tensors, models, tokenizers, settings.

    Example:
        >>> FunctionDescription(describe=repr).of(lambda rate=0.5: rate)["defaults"]
        {'rate': 0.5}
    """

    def __init__(self, describe: Callable[[Any], Any]) -> None:
        self._describe = describe
        self._known: dict[int, Any] = {}
        self._alive: list[Any] = []  # an object that is gone may leave its id to another

    def of(self, value: Any) -> dict[str, Any]:
        """Return what is known of a nameless function or class, of a method or a callable object."""
        match value:
            case FunctionType():
                found: dict[str, Any] = self.known(value)
                return found
            case MethodType():
                return {"class": import_name(value), "code": _digest(self.known(value))}
            case type():
                return {"class": value.__qualname__, "code": _digest(self.known(value))}
            case _:
                own = [self.known(type(value)), self.known(getattr(value, "__dict__", {}))]
                return {"code": _digest(own)}

    def known(self, value: Any) -> Any:
        """Return plain data that differs where two values that code reads do."""
        if id(value) in self._known:
            return self._known[id(value)]
        self._alive.append(value)
        self._known[id(value)] = "itself"  # until it is known; functions call themselves
        self._known[id(value)] = found = self._of_value(value)
        return found

    def _of_value(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case CodeType():
                return _steps(value)
            case FunctionType() if is_nameless(value):
                return self._of_function(value)
            case MethodType():
                return [self.known(value.__func__), self.known(value.__self__)]
            case property():
                return [self.known(part) for part in (value.fget, value.fset)]
            case staticmethod() | classmethod():
                return [type(value).__name__, self.known(value.__func__)]
            case partial():
                return [self.known(part) for part in (value.func, value.args, value.keywords)]
            case type() if is_nameless(value):
                return self._of_class(value)
            case re.Pattern():
                return [self.known(value.pattern), value.flags]
            case bytes() | bytearray():
                return value.hex()
            case np.ndarray() if value.dtype != object:
                return [str(value.dtype), list(value.shape), _digest(value.tobytes().hex())]
            case np.generic():
                return [str(value.dtype), value.tobytes().hex()]
            case ModuleType():
                return value.__name__
            case complex() | range() | slice() | PurePath() | Number() | date() | timedelta():
                return repr(value)
            case torch.dtype() | torch.device():
                return repr(value)
            case _:
                return self._of_object(value)

    def _of_object(self, value: Any) -> Any:
        """Return what is known of containers and of objects with a class of their own."""
        match value:
            case list() | tuple() | np.ndarray():
                return [self.known(item) for item in value]
            case set() | frozenset():
                return sorted((self.known(item) for item in value), key=repr)
            case Mapping():
                items = [[self.known(key), self.known(item)] for key, item in value.items()]
                return sorted(items, key=repr)
            case _ if is_dataclass(value) and not isinstance(value, type):
                own = [self.known(getattr(value, field.name)) for field in fields(value)]
                return [self.known(type(value)), own]
            case _ if hasattr(value, "__wrapped__"):  # a decorator's object, a cache
                return [import_name(type(value)), self.known(value.__wrapped__)]
            case torch.nn.Module() if isinstance(value, L.LightningModule):
                return import_name(type(value))  # it changes as it trains, and holds the function
            case torch.Tensor() | torch.nn.Module():
                return self._describe(value)
            case _ if hasattr(value, "__qualname__"):
                return import_name(value)
            case _ if is_nameless(type(value)):
                return [self.known(type(value)), self.known(getattr(value, "__dict__", {}))]
            case _:
                return import_name(type(value))

    def _of_function(self, function: FunctionType) -> dict[str, Any]:
        code = function.__code__
        values = {n: function.__globals__[n] for n in _reads(code) if n in function.__globals__}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                values[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        positional = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        by_name = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
        return {
            "class": function.__qualname__,
            "code": _digest(_steps(code)),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "defaults": self._shown(by_name | (function.__kwdefaults__ or {})),
            "values": self._shown(values),
        }

    def _of_class(self, cls: type) -> list[Any]:
        inherited = [self.known(base) for base in cls.__bases__]
        own = {
            name: self.known(member)
            for name, member in vars(cls).items()
            if name in {"__init__", "__call__"} or not name.startswith("__")
        }
        return [cls.__qualname__, inherited, own]

    def _shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _short(self.known(value)) for name, value in values.items()}


def _short(known: Any) -> Any:
    """Return numbers and functions as they are, and all else as a digest."""
    if known is None or isinstance(known, bool | int | float):
        return known
    if isinstance(known, dict):
        return known
    return _digest(known)


def _digest(known: Any) -> str:
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()


def _reads(code: CodeType) -> list[str]:
    """Return the names that code looks up, and the code within it: comprehensions, functions."""
    within = (name for c in code.co_consts if isinstance(c, CodeType) for name in _reads(c))
    return sorted({*code.co_names, *within})


def _steps(code: CodeType) -> list[Any]:
    """Return what code does and how it is called, without where it is written."""
    arguments = code.co_argcount + code.co_kwonlyargcount
    constants: list[Any] = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            constants.append(_steps(value))
        else:  # sets have no order of their own
            known = sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
            constants.append(known)
    return [
        code.co_code.hex(),
        getattr(code, "co_exceptiontable", b"").hex(),
        code.co_names,
        code.co_varnames[:arguments],  # callers name them
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
        [bool(code.co_flags & flag) for flag in _VARIABLE_ARGUMENTS],
        constants,
    ]
