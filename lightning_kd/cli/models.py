"""A model of the command line or of a configuration: by its name alone, and the later one wins."""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

_READ = get_loader("yaml")

_STARTS = ("name_or_path", "config")
"""What a model starts from: exactly one of them."""

_BARE = re.compile(r"--model\.(student|teacher)")
_START = re.compile(rf"--model\.(student|teacher)\.(?:init_args\.)?({'|'.join(_STARTS)})")


def is_model_name(value: object) -> bool:
    """Return whether a text is a model's directory or hub name, and not the name of a class.

    Example:
        >>> [is_model_name(name) for name in ("Qwen/Qwen3-0.6B", "ServedTeacher", "{config: {}}")]
        [True, False, False]
    """
    if not isinstance(value, str) or "{" in value or Path(value).is_file():
        return False
    return "/" in value or Path(value, "config.json").is_file()


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
    if name in {"student", "teacher", "member"} and is_model_name(part):
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
    given: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and _BARE.fullmatch(name) and is_model_name(value):
            argument = f"{name}.name_or_path={value}"
        elif given and _BARE.fullmatch(given[-1]) and is_model_name(argument):
            given[-1] += ".name_or_path"
        given.append(argument)
    starts: dict[str, dict[str, int]] = {}
    unset: set[tuple[str, str]] = set()
    for source, (role, start) in _starts(given):
        before = starts.setdefault(role, {})
        starts[role] = {k: at for k, at in before.items() if at == source} | {start: source}
        unset |= {(role, other) for other in before.keys() - starts[role].keys()}
        unset.discard((role, start))
    return [
        *given,
        *(w for role, other in sorted(unset) for w in (f"--model.{role}.{other}", "null")),
    ]


def _starts(arguments: list[str]) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield role and start of each model that a source gives one; options are the source 0."""
    flat = [part for argument in arguments for part in _split(argument)]
    for place, (option, value) in enumerate(pairwise(flat)):
        if option in {"--config", "-c"}:
            for found in _of_file(Path(value)):
                yield place + 1, found
        elif (found_option := _START.fullmatch(option)) and value != "null":
            yield 0, (found_option[1], found_option[2])


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
        for start in _STARTS:
            if model.get(start) is not None:
                yield role, start


def _inside(part: Any, name: str) -> dict[str, Any]:
    found = part.get(name) if isinstance(part, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
