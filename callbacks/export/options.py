"""Constructor arguments as everyone may read them."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.callbacks.export.redaction import SECRET_NAME, presentable
from lightning_kd.models import ModelSpec
from lightning_kd.resuming import Plain, Resumable

_LONGEST = 20
"""Items of a list that are told one by one."""

CARD = "README.md"
"""Name of the model card in a directory."""


def arguments_of(value: Resumable) -> dict[str, Plain]:
    """Return the constructor arguments of an object, without those that are None, or secrets.

    Example:
        >>> from lightning_kd.divergences import GeneralizedJSD
        >>> arguments_of(GeneralizedJSD(beta=0.1))
        {'beta': 0.1, 'normalized': False}
    """
    return _known(value.effective_arguments())


def shown(value: Any) -> Plain:
    """Return plain data that says what an argument is, and nothing of where it is on the machine."""
    match value:
        case None | bool() | int() | float():
            return value
        case str() | Path():
            return presentable(str(value))
        case ModelSpec():
            return _model(value)
        case PreTrainedModel() | PreTrainedTokenizerBase():
            return presentable(value.name_or_path) or type(value).__name__
        case Resumable():
            return _of_class(value, arguments_of(value))
        case Mapping():
            return _known({str(name): item for name, item in value.items()})
        case list() | tuple() | set() | frozenset():
            rows = any(isinstance(item, Mapping) for item in value)  # data is not published
            if rows or len(value) > _LONGEST:
                return f"{len(value)} items"
            return [shown(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            own = {field.name: getattr(value, field.name) for field in fields(value)}
            return _of_class(value, _known(own))
        case _:
            return getattr(value, "__qualname__", type(value).__qualname__)


def model_text(spec: ModelSpec) -> str:
    """Return where a model comes from."""
    if spec.is_given:
        return "a model that was handed over"
    if spec.name_or_path is not None:
        revision = "" if spec.revision is None else f", revision {spec.revision}"
        return presentable(spec.name_or_path) + revision
    kind = spec.config.get("model_type", "") if isinstance(spec.config, dict) else spec.config
    return f"random weights of a {presentable(str(kind))} config"


def base_model(spec: ModelSpec) -> str | None:
    """Return the name on the hub of the model that a student started from.

    A directory that was exported says in its model card what its own student started from.
    """
    if spec.name_or_path is None:
        return None
    directory = Path(spec.name_or_path).expanduser()
    if directory.is_dir():
        card = directory / CARD
        found = ModelCard.load(card).data.get("base_model") if card.is_file() else None
        return found if isinstance(found, str) else None
    return spec.name_or_path if is_repo_name(spec.name_or_path) else None


def is_repo_name(name: str) -> bool:
    """Return whether a text may be the name of a model or data set on the hub.

    Example:
        >>> is_repo_name("Qwen/Qwen3-0.6B"), is_repo_name("gpt2"), is_repo_name("runs/a/student")
        (True, True, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.match(r"[./~]", name) is None


def _model(spec: ModelSpec) -> Plain:
    """Return where a model comes from, and how it is loaded, where that is not the default."""
    default = {name: p.default for name, p in inspect.signature(type(spec)).parameters.items()}
    told = {"name_or_path", "config", "revision"}
    options = {} if spec.is_given else spec.effective_arguments()
    chosen = {n: v for n, v in options.items() if n not in told and v != default.get(n)}
    return {"from": model_text(spec), **_known(chosen)} if chosen else model_text(spec)


def _known(arguments: Mapping[str, Any]) -> dict[str, Plain]:
    return {
        name: shown(value)
        for name, value in arguments.items()
        if value is not None and not SECRET_NAME.search(name)
    }


def _of_class(value: object, arguments: dict[str, Plain]) -> Plain:
    return {type(value).__name__: arguments} if arguments else type(value).__name__
