"""Errors of the command line, in a few lines that help."""

import re
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

import lightning_kd.callbacks
import lightning_kd.public
from lightning_kd.cli.class_choices import NO_CLASS, class_comes_first, classes_to_choose
from lightning_kd.cli.habits import ELSEWHERE, OF_EVALUATE, TYPED_ALONE
from lightning_kd.imports import why_no_class

_ACCIDENTS = (TypeError, AttributeError, LookupError, NameError)
"""Errors that Python raises by itself; none of them is written as a message."""

_NOT_INSTALLED = "Requirement "
"""How Lightning begins to say that a class needs another package."""

_NEEDS_QUOTES = 'in a file, text with a colon or braces needs quotes: "Q: {prompt}"'


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the description as they stand."""


class ShortErrors(ArgumentParser):
    """Parser whose errors take a few lines and exit with 2; options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._made: type | None = None

    def add_class_arguments(
        self, class_type: type, nested_key: str | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Add the arguments of a class, and remember it if it is the only one."""
        self._made = class_type if nested_key is None else None
        names: list[str] = super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        return names

    def print_help(self, *args: Any, **kwargs: Any) -> None:
        """Print help; of a base, which has no options, the classes to choose."""
        base = re.match(r"Help for (--[\w.]+\.help)=([\w.]+)$", self.description or "")
        choices = classes_to_choose(f"{NO_CLASS}. <class '{base[2]}'>") if base else []
        if base and choices and not any(action.option_strings for action in self._actions):
            print(f"{base[1]} is of one class: {choices[0]}")
            return
        super().print_help(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the lines of ``message`` that help, and exit."""
        text, names = full_names(shorten(message), sys.argv[1:]), unknown_names(message)
        if self._made is not None and message.startswith("the following arguments are required"):
            text = f"{self._made.__name__}: {text}"
        reason = why_refused(message)
        if reason:
            text = f"{text.splitlines()[0]}\n  {reason}"
        lines = [text, *(suggestion(name, self._options(), sys.argv[1:]) for name in names)]
        lines += [*classes_to_choose(message + self._types_of_help(message)), *forms(message)]
        lines += class_comes_first(message, sys.argv[1:])
        given = [f".{word}" for word in re.findall(r"[\w.]+", " ".join(sys.argv))]
        elsewhere = [n for n in names if not any(word.endswith(f".{n}") for word in given)]
        if elsewhere or re.match("Problems parsing config|Unexpected config", text):
            files = [b for a, b in pairwise(sys.argv) if a in {"--config", "-c"}]
            lines += [f"(in {' or '.join(files)})"] if files else []
        said = "\n  ".join(filter(None, lines))
        sys.stderr.write(f"lightning-kd: error: {said}\n")
        raise SystemExit(2)

    def _types_of_help(self, message: str) -> str:
        """Return the types of the option whose help was asked for by an unknown class."""
        asked = re.match(r"--([\w.]+\.help): ", message)
        helping = [a for a in self._actions if asked and a.dest == asked[1]]
        return "".join(f" {getattr(action, '_typehint', '')}" for action in helping)

    def _options(self) -> set[str]:
        """Names of the options, those of subcommands too."""
        own = [action for action in self._actions if action.dest != "help"]
        below = [action.choices for action in own if isinstance(action.choices, dict)]
        parsers = [parser for choices in below for parser in choices.values()]
        actions = [*own, *(action for parser in parsers for action in parser._actions)]
        return {a.dest for a in actions if a.option_strings and a.dest.split(".")[-1] != "help"}


class ShortErrorParser(ShortErrors, LightningArgumentParser):
    """Parser of the trainer's commands with short errors."""


def unknown_names(message: str) -> list[str]:
    """Return the options that a jsonargparse message calls unknown.

    Example:
        >>> unknown_names("unrecognized arguments: --trainer.max_step 5")
        ['trainer.max_step']
        >>> unknown_names("Group 'trainer' does not accept option 'max_step'")
        ['trainer.max_step']
    """
    if message.startswith("unrecognized arguments:"):
        return re.findall(r"--([\w.]+)", message)
    found = re.match(r"(?:Group '(.+?)' |Sub.+? )?(?:does not accept o|O)ption '(.+?)'", message)
    return [".".join(filter(None, found.groups()))] if found else []


def suggestion(name: str, options: Collection[str], arguments: Sequence[str] = ()) -> str:
    """Return a line with the options that an unknown one may mean, or with the choices.

    Args:
        name: What came, as the parser knows it.
        options: The names that the parser knows.
        arguments: The command line, which has the name with all that is before it.

    Returns:
        The line; empty where the name is known (and came at a wrong place).

    Example:
        >>> suggestion("max", {"max_steps", "max_time", "limit"}, ["--trainer.max=5"])
        '--trainer.max: did you mean --trainer.max_steps or --trainer.max_time?'
        >>> suggestion("modle.alpha", {"model", "data"})
        'modle.alpha: did you mean model.alpha?'
        >>> suggestion("devices", {"trainer.devices", "trainer.max_steps"}, ["--devices"])
        '--devices: did you mean --trainer.devices?'
        >>> suggestion("size", {"beta", "alpha"})
        'size: the choices are alpha, beta'
        >>> suggestion("engine", {"max_new_tokens"}, ["--on_policy.generation.engine=own.Engine"])
        '--on_policy.generation.engine: an engine stands beside generation: --on_policy.engine'
    """
    if name in options:
        return ""
    full = spelled_as(name, arguments)
    habits = OF_EVALUATE if "completions" in options else ELSEWHERE
    if "." not in full and "on_policy" in options:
        habits = ELSEWHERE | TYPED_ALONE
    known_as = habits.get(name.rpartition(".")[2], full)
    if full.startswith("--") and full != known_as:
        return f"{full}: did you mean {known_as}?"
    before, parts, group = full.removesuffix(name), name.split("."), name.rpartition(".")[0]
    if name == "engine" and "max_new_tokens" in options:
        owner = before.removesuffix("generation.")
        places = [owner] if owner else ["on_policy.", "model."]
        return (
            f"{full}: an engine stands beside generation: {' or '.join(p + name for p in places)}"
        )
    options = {o for o in options if not o.endswith("print_shtab")}
    beside = sorted(o for o in options if o.rpartition(".")[0] == group)
    meant = [option for option in beside if option.startswith(name)]
    if not meant:
        # Without a group of that name: one that is alike, or a class, whose own options are behind it.
        groups = {o.rpartition(".")[0] for o in options}

        def likeness(option: str) -> float:
            head = ".".join(parts[: option.count(".") + 1])
            same = len(group) if beside else 0
            return SequenceMatcher(None, option[same:], head[same:]).ratio()

        near = sorted(beside or set(options) - groups, key=likeness, reverse=True)
        near = [option for option in near[:3] if likeness(option) > 0.7]
        meant = [".".join([option, *parts[option.count(".") + 1 :]]) for option in near]
    if meant:
        sampling = full == "--model.temperature" and "teacher_temperature" in meant
        aside = " That of sampling is --on_policy.generation.temperature" if sampling else ""
        return f"{full}: did you mean {' or '.join(before + option for option in meant)}?{aside}"
    behind = sorted(o for o in options if "." not in name and o.rpartition(".")[2] == name)
    if behind:
        return f"{full}: did you mean {' or '.join(before + option for option in behind)}?"
    choices = beside or sorted(o for o in options if "." not in o)
    if not choices:
        return f"{full}: the class that is chosen there has no options"
    return f"{full}: the choices are {', '.join(before + option for option in choices)}"


def spelled_as(name: str, arguments: Sequence[str]) -> str:
    """Return an option as the command line has it; as it is where it is not there.

    Example:
        >>> spelled_as("alpha", ["fit", "--model.alpha=half"])
        '--model.alpha'
    """
    spelled = [a.split("=")[0] for a in arguments if a.startswith("--")]
    return next((s for s in spelled if s.lstrip("-") == name or s.endswith(f".{name}")), name)


def full_names(text: str, arguments: Sequence[str]) -> str:
    """Put options of the command line in place of the keys of the parser within.

    Example:
        >>> full_names('Parser key "alpha": Expected a float', ["--model.alpha", "half"])
        '--model.alpha: Expected a float'
    """

    def option(found: re.Match[str]) -> str:
        full = spelled_as(found[1], arguments)
        return full if full.startswith("--") else found[0]

    return re.sub(r'Parser key "([\w.]+)"', option, text)


def why_refused(message: str) -> str:
    """Return why the class that a jsonargparse message refuses cannot be used; empty if unknown."""
    if not re.search("given class_path|is abstract|does not correspond to a subclass", message):
        return ""
    paths = re.findall(r"(?:given class_path '|Given value: )(\w+(?:\.\w+)+)'?:?$", message, re.M)
    bases = re.findall(r"<class '[\w.]+\.(\w+)'>", message.partition("Errors:")[0])
    return why_no_class(paths[-1], bases[-1]) if paths and bases else ""


def forms(message: str) -> list[str]:
    """Return a line with the form of a value that came in another.

    Example:
        >>> print(*forms("Expected a <class 'list'>. Got value: corpus.txt"))
        a list is written in brackets: '["corpus.txt"]'
        >>> print(*forms("unrecognized arguments: configs/sft.yaml"))
        did you mean --config configs/sft.yaml?
    """
    if message.startswith("unrecognized arguments:"):
        files = re.findall(r"(?<= )([^-\s]\S*\.ya?ml)(?!\S)", message)
        return [f"did you mean {' '.join(f'--config {file}' for file in files)}?"] if files else []
    if 'Parser key "members"' in message:
        return [
            "members: [{name_or_path: runs/a}, {name_or_path: runs/b}] for a TeacherEnsemble, and for "
            "a RoutedTeacher, by values of its column, {math: {name_or_path: runs/a}, ...}"
        ]
    if 'Parser key "prompt_template"' in message:
        return [_NEEDS_QUOTES]
    pattern = r"Expected a <class 'list'>(?:\. Got value: |[\s\S]*?Given value: )([\w./-]+)$"
    found = re.search(pattern, message, re.M)
    return [f"a list is written in brackets: '[\"{found[1]}\"]'"] if found else []


def shorten(message: str) -> str:
    """The lines of a jsonargparse message that say what came and what was expected.

    Example:
        >>> print(shorten('''Parser key "model":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'JSD'>, <class 'NoneType'>]
        ...   Errors:
        ...     - beta is 3.0; it must lie in [0, 1]
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'float'>'''))
        Parser key "model":
          beta is 3.0; it must lie in [0, 1]
    """
    noise = re.compile(
        r"\s*(- )?(Expected a <class 'NoneType'>|Subtypes:|Given value type|Given value: .{80}"
        r"|Does not validate|Errors:$)"
    )
    # Of several classes that may stand there, one does not fit; what the right one says comes with it.
    aside = re.compile(
        "Import path [\\w.]+ does not correspond|Expected a path but .* not accessible"
    )
    place = ("Parser key", "Problem", "Given value")
    # A text is often one of several choices; where it is the only one, it is what was expected.
    lines = [line for line in message.splitlines() if line.strip() and not noise.match(line)]
    others = [line for line in lines if "Expected a <class 'str'>" not in line]
    if others != lines and all(line.startswith(place[:2]) for line in others):
        others = [*lines, _NEEDS_QUOTES]
    telling = [line for line in others if not aside.search(line)]
    if not all(line.strip().removeprefix("- ").startswith(place) for line in telling):
        others = telling
    texts = list(dict.fromkeys(line.strip().removeprefix("- ") for line in others))
    if any(text.startswith((NO_CLASS, _NOT_INSTALLED)) for text in texts):
        texts = [t for t in texts if not t.startswith(("Expected a <class", "Given value"))]
    return re.sub(rf"{NO_CLASS}(\S+)", r"there is no class '\1'", "\n  ".join(texts) or message)


def is_for_the_user(error: BaseException) -> bool:
    """Return whether an error is a message of this library or Lightning, not a defect below them."""
    if isinstance(error, _ACCIDENTS):
        return False
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    home = Path(lightning_kd.__file__).resolve().parent
    homes = (home, (home / "callbacks").resolve(), Path(lightning.__file__).resolve().parent)
    return any(last.is_relative_to(folder) for folder in homes)
