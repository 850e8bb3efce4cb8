"""A model of the command line or of a configuration: by its name alone, and the later one wins."""

import json
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

import lightning_kd.public
from lightning_kd.models import ModelSpec
from lightning_kd.teachers import Teacher

_READ = get_loader("yaml")

_STARTS = ("name_or_path", "config")
"""What a model starts from: exactly one of them."""

_BARE = re.compile(r"--model\.(student|teacher|reference)")
_START = re.compile(rf"--model\.(student|teacher)\.(?:init_args\.)?({'|'.join(_STARTS)})(?:\.\w+)*")

_DIRECTORY: ContextVar[Path] = ContextVar("_DIRECTORY", default=Path())
"""Where the command was typed; the parser reads a file in the directory of that file."""


def is_model_name(value: object) -> bool:
    """Return whether a text is a model's directory or hub name, and not the name of a class.

    A word that begins with a capital and resembles a class is a class that was misspelt, unless a model
    lies in a directory of that name.

    Example:
        >>> [is_model_name(name) for name in ("Qwen/Qwen3-0.6B", "gpt2", "Qwen2.5-0.5B")]
        [True, True, True]
        >>> [is_model_name(name) for name in ("ServedTeachr", "my.OwnTeacher", "{config: {}}")]
        [False, False, False]
    """
    if not isinstance(value, str) or value in {"", "~", "null"} or value[0] in "-[{":
        return False
    if "{" in value or value.endswith((".yaml", ".yml", ".json")) or Path(value).is_file():
        return False
    place = _DIRECTORY.get() / value
    if any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
        return True
    return "/" in value or not _may_be_class(value)


def _may_be_class(word: str) -> bool:
    parts = word.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    if len(parts) > 1:
        return parts[-1][0].isupper() or find_spec(parts[0]) is not None
    bases: tuple[type, ...] = (ModelSpec, Teacher)
    names = [cls.__name__ for base in bases for cls in _all_below(base)]
    near = word[0].isupper() and get_close_matches(word, names)
    return bool(near) or word in names or word in lightning_kd.public.__all__


def _all_below(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for cls in base.__subclasses__():
        yield from _all_below(cls)


def read_file(text: str) -> Any:
    """Read what a configuration file says, models by their names too."""
    return with_named_models(_READ(text))


def with_named_models(config: Any) -> Any:
    """Put ``{name_or_path: NAME}`` in place of names of models in what a file says.

    Example:
        >>> with_named_models({"model": {"init_args": {"teacher": "org/name"}}})
        {'model': {'init_args': {'teacher': {'name_or_path': 'org/name'}}}}
    """
    if not isinstance(config, dict):
        return config
    if isinstance(config.get("model"), dict):
        return {**config, "model": _named(config["model"])}
    return {name: with_named_models(part) for name, part in config.items()}


def _named(part: Any, name: str = "") -> Any:
    if isinstance(part, dict):
        key = "member" if name == "members" else ""
        return {below: _named(value, key or below) for below, value in part.items()}
    if isinstance(part, list) and name == "members":
        return [_named(member, "member") for member in part]
    if isinstance(part, list) and name == "teacher":
        return {"class_path": "TeacherEnsemble", "init_args": {"members": _named(part, "members")}}
    if name in {"student", "teacher", "reference", "member"} and is_model_name(part):
        return {"name_or_path": part}
    return part


def settle_models(arguments: list[str]) -> list[str]:
    """Return a command line in which each model has one start: what came last.

    A name of a student or teacher stands for its ``name_or_path``. Where a later file, or an option,
    gives a model another start than an earlier file, the earlier one is unset; one file, or the options
    together, that give both are left for the model to refuse.

    Example:
        >>> settle_models(["fit", "--model.student", "org/name"])
        ['fit', '--model.student.name_or_path', 'org/name']
    """
    _DIRECTORY.set(Path.cwd())
    given: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.startswith("--"):
            option, value = _with_name(name, value)
            argument = f"{option}={value}"
        elif given:
            given[-1], argument = _with_name(given[-1], argument)
        given.append(argument)
    starts: dict[str, dict[str, int]] = {}
    unset: set[tuple[str, str]] = set()
    several, alone = False, set()
    for place, source, (role, start) in _starts(given):
        if start == "members":
            several, starts[role] = True, {}
            unset -= {(role, other) for other in _STARTS}
            alone.discard(place)
            continue
        if start == "class_path":
            several = False
            continue
        if several and role == "teacher":
            alone.add(place)
            several = False
        before = starts.setdefault(role, {})
        starts[role] = {k: at for k, at in before.items() if at == source} | {start: source}
        unset |= {(role, other) for other in before.keys() - starts[role].keys()}
        unset.discard((role, start))
    settled: list[str] = []
    for place, argument in enumerate(given):
        settled += ["--model.teacher", "LocalTeacher"] if place in alone else []
        settled.append(argument)
    return [
        *settled,
        *(w for role, other in sorted(unset) for w in (f"--model.{role}.{other}", "null")),
    ]


def _with_name(option: str, value: str) -> tuple[str, str]:
    """Return an option and its value as the parser knows them, names of models in full."""
    if _BARE.fullmatch(option) and is_model_name(value):
        return f"{option}.name_or_path", value
    role = re.fullmatch(r"--model\.(?:teacher\.(?:init_args\.)?(members)|(teacher))", option)
    if role and value.startswith(("[", "{") if role[1] else "["):
        try:
            said = _READ(value)
        except (ValueError, yaml.YAMLError):  # which the parser says better
            return option, value
        return option, json.dumps(_named(said, role[1] or role[2]))
    return option, value


def _starts(arguments: list[str]) -> Iterator[tuple[int, int, tuple[str, str]]]:
    """Yield place, source, and role and start of each model; options are the source 0.

    The start of several teachers is ``members``; of a class that is named, ``class_path``.
    """
    for place, argument in enumerate(arguments):
        option, *values = _split(argument)
        value = [*values, *arguments[place + 1 : place + 2], ""][0]
        if option in {"--config", "-c"}:
            for found in _of_file(Path(value)):
                yield place, place + 1, found
        elif (found_option := _START.fullmatch(option)) and value != "null":
            yield place, 0, (found_option[1], found_option[2])
        elif re.match(r"--model\.teacher\.(init_args\.)?members\b", option):
            yield place, 0, ("teacher", "members")
        elif re.fullmatch(r"--model\.teacher(\.class_path)?", option):
            yield place, 0, ("teacher", "members" if '"members"' in value else "class_path")


def _split(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name.startswith("--") else [argument]


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        said = read_file(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):  # which the parser says better
        return
    options = _inside(_inside(said, "model"), "init_args")
    for role in ("student", "teacher"):
        model = _inside(options, role)
        model = {**model, **_inside(model, "init_args")}
        if role == "teacher" and "class_path" in model:
            yield role, "class_path"
        for start in _STARTS:
            if model.get(start) is not None:
                yield role, start
        if model.get("members") is not None:
            yield role, "members"


def _inside(part: Any, name: str) -> dict[str, Any]:
    found = part.get(name) if isinstance(part, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
