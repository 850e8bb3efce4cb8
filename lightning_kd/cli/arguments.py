"""What a command line means, where the parser would read something else."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_kd.data.readers import ending

_TEMPLATE = r"--(?:[\w.]+\.)?prompt_template"

_OPTION_OF_OPTION = r"--(?:model|data|on_policy)(?:\.\w+){2,}"
"""An option that the parser hands on to another parser, as text: of null it makes ``None``."""


class Text(str):
    """Text of the command line that is not read as YAML, which it may look like."""

    __slots__ = ()


yaml.SafeDumper.add_representer(Text, yaml.SafeDumper.represent_str)


def as_text(arguments: list[str]) -> list[str]:
    """Mark what is not to be read as YAML: templates, and a null that another parser reads.

    Example:
        >>> [type(a).__name__ for a in as_text(["--data.prompt_template", "Q: {prompt}"])]
        ['str', 'Text']
        >>> [type(a).__name__ for a in as_text(["--data.prompt_template", '["{a}: {b}", "{a}"]'])]
        ['str', 'str']
        >>> [type(a).__name__ for a in as_text(["--model.student.config", "null"])]
        ['str', 'Text']
    """
    given: list[str] = []
    for argument in arguments:
        if given and _is_text(given[-1], argument):
            given.append(Text(argument))
            continue
        name, equals, value = argument.partition("=")
        given += [name, Text(value)] if equals and _is_text(name, value) else [argument]
    return given


def _is_text(name: str, value: str) -> bool:
    if value.startswith(('["', "['")):  # a list of templates
        return False
    handed_on = value == "null" and re.fullmatch(_OPTION_OF_OPTION, name)
    return bool(handed_on or re.fullmatch(_TEMPLATE, name))


def with_student_data(arguments: list[str]) -> list[str]:
    """Return the command line of ``evaluate`` with the data that it has by itself, to be changed.

    Example:
        >>> with_student_data(["evaluate", "--student", "runs/student", "--data.test", "a.jsonl"])[:5]
        ['evaluate', '--data', 'PromptCompletionData', '--data.tokenizer', 'runs/student']
        >>> with_student_data(["serve", "--teacher", "runs/teacher"])
        ['serve', '--teacher', 'runs/teacher']

    Raises:
        ValueError: If nothing says which student, or a file stands in the place of a class.
    """
    flat = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    if arguments[:1] != ["evaluate"] or flat[-1] in {"-h", "--help"}:
        return arguments
    for option, value in pairwise(flat):
        if option == "--data" and ending(value):
            raise ValueError(
                f"--data {value}: the class of the data is chosen there; write --data.test {value}"
            )
    own = ["--data", "PromptCompletionData"]
    if "--student" in flat[:-1]:
        own += ["--data.tokenizer", flat[flat.index("--student") + 1]]
    elif not {"--config", "--data.help", "--completions.help", "--callbacks.help"} & {*flat}:
        raise ValueError("which model? give --student, its directory or hub name")
    return [arguments[0], *own, *as_text(arguments[1:])]


def missing_arguments(config: Any) -> Iterator[str]:
    """Yield a message for each constructor argument without type, default and value.

    The parser knows the arguments with a type; for one without, it passes None.

    Args:
        config: A parsed configuration, or part of one.
    """
    if isinstance(config, list):
        for item in config:
            yield from missing_arguments(item)
    if not isinstance(config, dict | Namespace):
        return
    members = config if isinstance(config, dict) else vars(config)
    path, given = members.get("class_path"), members.get("init_args")
    if isinstance(path, str) and isinstance(given, Namespace):
        module, _, name = path.rpartition(".")
        for parameter in inspect.signature(
            getattr(import_module(module), name)
        ).parameters.values():
            untyped = parameter.annotation is parameter.default is inspect.Parameter.empty
            if untyped and vars(given).get(parameter.name, ...) is None:
                yield f"{path} needs {parameter.name}, which has no default; give it a value"
    for item in members.values():
        yield from missing_arguments(item)
