"""Settings of a run as plain data, which a resumed run is compared with."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightning_kd.functions import FunctionDescription, import_name, is_nameless

Plain = None | bool | int | float | str | list[Any] | dict[str, Any]
"""Settings in a checkpoint: nothing that would have to be unpickled."""

SHOWN = 8
"""Differences that an error lists."""

_HASHED_TOGETHER = 2**26
"""Bytes of a tensor that are brought to the CPU at once."""

_CLASS = "class"
_NO_MATTER = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attn_implementation",
}
"""Fields of a model's configuration that do not change what it computes, or are compared apart."""


class Resumable:
    """Remembers its constructor arguments, so that a resumed run can be compared with the saved one.

    Methods, data modules, divergences, normalizations, teachers and what else decides a loss derive
    from it, and so do their subclasses of your own. An argument that differs on a resume is refused by
    its name, unless a class in the hierarchy lists it in ``may_change_on_resume``. A callback of your
    own that changes the loss or the data takes part by deriving from this class too.

    Example:
        >>> class Scaled(Resumable):
        ...     may_change_on_resume = frozenset({"workers"})
        ...     def __init__(self, scale: float = 1.0, workers: int = 0) -> None:
        ...         self.scale = scale
        >>> Scaled(workers=3).resume_settings()
        {'scale': 1.0}
    """

    may_change_on_resume: ClassVar[frozenset[str]] = frozenset()
    """Constructor arguments that may change when a run is resumed."""

    resume_name: ClassVar[str] = ""
    """Name of a callback in errors; empty for its class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an instance that remembers what it is given."""
        if cls.__init__ is object.__init__ and (args or kwargs):
            raise TypeError(f"{cls.__name__}() takes no arguments")
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", _bound(cls, args, kwargs))
        return self

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that must not change, by name, defaults included.

        Those of :meth:`effective_arguments`, without what may change.
        """
        allowed = {
            n for cls in type(self).__mro__ for n in vars(cls).get("may_change_on_resume", ())
        }
        return {n: value for n, value in self.effective_arguments().items() if n not in allowed}

    def effective_arguments(self) -> dict[str, Any]:
        """Return all arguments by name, defaults included.

        Where an argument is a shorthand (a registered name, or None for a default) and the attribute
        of its name holds what was made of it, that is taken.
        """
        settings: dict[str, Any] = {}
        for name, given in self.constructor_arguments().items():
            made = vars(self).get(name, vars(self).get(f"_{name}"))
            settings[name] = made if isinstance(made, Resumable) or is_dataclass(made) else given
        return settings

    def constructor_arguments(self) -> dict[str, Any]:
        """Return all arguments of the constructor as they were given, by name, defaults included."""
        return {**_defaults(type(self)), **self._arguments}

    _arguments: dict[str, Any]


def describe(value: Any) -> Plain:
    """Return plain data that is equal for two values exactly where they mean the same.

    Functions are known by their names, and by what they do where no import finds them by these
    (:class:`~lightning_kd.functions.FunctionDescription`); tensors and models by a digest, other
    objects by their class and attributes.

    Example:
        >>> describe({"betas": (0.9, 0.95), "dtype": torch.bfloat16})
        {'betas': [0.9, 0.95], 'dtype': 'torch.bfloat16'}
    """
    match value:
        case Enum():
            return describe(value.value)
        case None | bool() | int() | float() | str():
            return value
        case Resumable():
            return {_CLASS: type(value).__qualname__} | _described(value.resume_settings())
        case PretrainedConfig():
            kept = {k: v for k, v in value.to_dict().items() if k[0] != "_" and k not in _NO_MATTER}
            return _described(kept)
        case PreTrainedTokenizerBase():
            return tokenizer_digest(value)
        case Mapping():
            return _described(value)
        case set() | frozenset():
            return sorted((describe(item) for item in value), key=repr)
        case list() | tuple():
            return [describe(item) for item in value]
        case Tensor():
            return describe(value.item()) if value.ndim == 0 else digest([("", value)])
        case nn.Module():
            return {_CLASS: type(value).__qualname__, "weights": weights_digest(value)}
        case partial():
            parts = {"args": value.args, "keywords": value.keywords}
            known = describe(value.func)
            return (known if isinstance(known, dict) else {_CLASS: known}) | _described(parts)
        case type():
            return value.__qualname__
        case _ if is_dataclass(value):
            own = {field.name: getattr(value, field.name) for field in fields(value)}
            return {_CLASS: type(value).__qualname__} | _described(own)
        case FunctionType() | MethodType() if is_nameless(value):
            return FunctionDescription(describe).of(value)
        case MethodType():
            return _described({_CLASS: import_name(value), "self": value.__self__})
        case _ if hasattr(value, "__wrapped__"):  # a cache
            return describe(value.__wrapped__)
        case _ if callable(value) and hasattr(value, "__qualname__"):
            return import_name(value)
        case _ if type(value).__module__ in {"pathlib", "torch"}:
            return str(value)
        case _:
            own = {k: v for k, v in getattr(value, "__dict__", {}).items() if k[0] != "_"}
            code = FunctionDescription(describe).of(value) if callable(value) else {}
            return {_CLASS: type(value).__qualname__} | code | _described(own)


def differences(saved: Plain, now: Plain, path: str = "") -> Iterator[str]:
    """Name what differs between two descriptions, one line for each.

    Example:
        >>> list(differences({"a": {"beta": 0.5}, "b": 1}, {"a": {"beta": 0.1}, "b": 1}))
        ['a.beta: 0.5 -> 0.1']
    """
    if isinstance(saved, dict) and isinstance(now, dict) and saved.get(_CLASS) == now.get(_CLASS):
        for name in dict.fromkeys([*saved, *now]):
            inner = f"{path}.{name}" if path else name
            yield from differences(saved.get(name), now.get(name), inner)
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for number, (before, after) in enumerate(zip(saved, now, strict=True)):
            yield from differences(before, after, f"{path}[{number}]")
    elif saved != now and not (saved != saved and now != now):
        yield f"{path}: {_short(saved)} -> {_short(now)}"


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors: name, shape, type and every byte of each."""
    hashed = hashlib.sha256()  # which processors have instructions for
    for name, tensor in tensors:
        tensor = tensor.detach()
        # The digest of a sharded weight is that of the weight; every process asks for it.
        flat = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).flatten()
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = flat.contiguous().view(torch.uint8)
        for start in range(0, len(flat), _HASHED_TOGETHER):
            hashed.update(flat[start : start + _HASHED_TOGETHER].cpu().numpy().data)
    return hashed.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights, and of the buffers that are saved with them."""
    passing = {
        f"{path}.{name}".lstrip(".")
        for path, part in model.named_modules()
        for name in part._non_persistent_buffers_set
    }
    kept = ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)
    return digest(chain(model.named_parameters(), kept))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what a tokenizer makes of text: vocabulary, rules, templates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What pads and cuts is switched by every call.
    rules = (
        {} if backend is None else json.loads(backend.to_str()) | {"padding": 0, "truncation": 0}
    )
    parts = [
        sorted(tokenizer.get_vocab().items()),
        rules,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        str(getattr(tokenizer, "chat_template", None)),
    ]
    text = json.dumps(parts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; none where they do not fit, which the constructor then says."""
    parameters = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = parameters.bind(None, *args, **kwargs).arguments
    except TypeError:
        return {}
    given: dict[str, Any] = {}
    for (name, value), number in zip(bound.items(), range(len(bound)), strict=True):
        if parameters.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif number > 0:  # the first is the instance
            given[name] = value
    return given


def _defaults(cls: type) -> dict[str, Any]:
    """Default values of a constructor, and of those to which it passes further options."""
    found: dict[str, Any] = {}
    for part in cls.__mro__:
        if "__init__" not in vars(part) or part is object:
            continue
        parameters = inspect.signature(vars(part)["__init__"]).parameters.values()
        for parameter in parameters:
            if parameter.default is not inspect.Parameter.empty:
                found.setdefault(parameter.name, parameter.default)
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def _described(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): describe(value) for name, value in values.items()}


def _short(value: Plain) -> str:
    text = str(value[_CLASS] if isinstance(value, dict) and _CLASS in value else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
