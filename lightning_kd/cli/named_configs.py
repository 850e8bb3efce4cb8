"""Configurations that come with the package, and how ``--config`` takes them by name."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap

_PACKAGE = Path(__file__).resolve().parents[1]

# The second is that of a checkout in which links are no links; what is installed has the first.
_HOMES = [place for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if place.is_dir()]

NAMED_CONFIGS = {
    path.relative_to(home.resolve()).with_suffix("").as_posix(): path
    for home in _HOMES[:1]
    for path in sorted(home.resolve().rglob("*.yaml"))
}
"""File of each configuration, by its name: ``gkd``, ``overlays/ddp``, ``experiments/stories``."""


def list_names(indent: str = "") -> str:
    """Return the names, those of a folder together, in lines of at most 100 columns.

    Args:
        indent: Before each line.
    """
    groups: dict[str, list[str]] = {}
    for name in NAMED_CONFIGS:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    lines = (
        wrap(", ".join(groups[folder]), 100 - len(indent), break_on_hyphens=False)
        for folder in sorted(groups)
    )
    return "\n".join(f"{indent}{line}" for of_folder in lines for line in of_folder)


def config_file(value: str, option: str = "--config") -> str:
    """Return the file that a value of ``--config`` means; text of a configuration stays as it is.

    Args:
        value: A file that exists, a name of :data:`NAMED_CONFIGS`, or YAML itself.
        option: What it was given with.

    Returns:
        The file. One that exists comes before a name; a directory is none.

    Raises:
        ValueError: If it is none of these, with the names.

    Example:
        >>> config_file("overlays/ddp").endswith("configs/overlays/ddp.yaml")
        True
        >>> config_file("{seed_everything: 1}")
        '{seed_everything: 1}'
    """
    path = Path(value)
    if re.search(r"[{\n]|:(\s|$)", value) or (path.exists() and not path.is_dir()):
        return value
    if value in NAMED_CONFIGS:
        return str(NAMED_CONFIGS[value])
    inside = value.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    near = get_close_matches(inside.lower(), NAMED_CONFIGS, n=1)
    hint = f"; did you mean {option} {near[0]}?" if near else "."
    raise ValueError(
        f"{option} {value}: there is no file {value}, and no configuration of that name comes with "
        f"lightning-kd{hint} The names are\n{list_names('  ')}"
    )


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the files of configurations in place of their names.

    Args:
        arguments: The command line, without the program's name.

    Raises:
        ValueError: If a value of ``--config`` is neither a file nor a name, or the name of an
            experiment for a command that makes one run, or the other way round.

    Example:
        >>> words = with_config_files(["fit", "--config=gkd", "--model.alpha", "1"])
        >>> [word.rpartition("/")[2] for word in words]
        ['fit', 'gkd.yaml', '--model.alpha', '1']
    """
    given: list[str] = []
    option, command = "", arguments[0] if arguments else ""
    for word in arguments:
        name, equals, value = word.partition("=")
        if option and not word.startswith("-"):
            word = _file_for(command, word, option)
            option = option if option == "--configs" else ""
        elif equals and name in _OPTIONS:
            word = f"{name}={_file_for(command, value, name)}"
            option = name if name == "--configs" else ""
        else:
            option = word if word in _OPTIONS else ""
        given.append(word)
    return given


def _file_for(command: str, value: str, option: str) -> str:
    """Return :func:`config_file`, where a name is of what a command reads."""
    file = config_file(value, option)
    if file != value:  # a name
        experiment = value.startswith("experiments/")
        of_several = command == "compare" and option != "--configs"
        if experiment and not of_several:
            raise ValueError(
                f"{option} {value} is an experiment, which is several runs: lightning-kd compare "
                f"--config {value} makes them"
            )
        if of_several and not experiment:
            raise ValueError(
                f"{option} {value} is the configuration of one run, and compare --config takes an "
                f"experiment, of several: lightning-kd fit --config {value}, or lightning-kd compare "
                f"--configs {value} and others"
            )
    return file


def config_files_or_exit(arguments: Sequence[str]) -> list[str]:
    """Return :func:`with_config_files`; what is neither a file nor a name ends the process with 2."""
    try:
        return with_config_files(arguments)
    except ValueError as error:
        sys.stderr.write(f"lightning-kd: error: {error}\n")
        raise SystemExit(2) from error


_OPTIONS = ("--config", "-c", "--configs")
"""Options whose values are configurations; of the last, all that follow are."""
