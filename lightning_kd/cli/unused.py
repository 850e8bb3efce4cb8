"""Options of a command line that its command cannot use: refused by name, never ignored."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_READ_BY = {"predictions": ("predict",), "export": ("fit", "check", "export")}
"""Groups of options that every configuration has, and the commands that they are for."""

_NOT_OF_EXPORT = re.compile(
    r"--(model\.(?!(init_args\.)?(student|tokenizer)\b)|data\.(?!\S*tokenizer)|on_policy|non_finite"
    r"|preflight|trainer\.(callbacks|logger|limit_|max_|min_|val_|check_val|log_every|accumulate))[\w.+]*"
)
"""What belongs to training alone."""


def check_used(arguments: Sequence[str]) -> None:
    """Validate that a command uses the options that were typed; configurations may have more.

    Args:
        arguments: The command line, without the program's name.

    Raises:
        ValueError: If one would have no effect, by its name.

    Example:
        >>> check_used(["predict", "--predictions.path", "written.jsonl"])
        >>> check_used(["fit", "--predictions.path", "written.jsonl"])
        Traceback (most recent call last):
            ...
        ValueError: --predictions.path has no effect on fit: it is for predict. Leave it out
    """
    command, names = arguments[0] if arguments else "", [a.partition("=")[0] for a in arguments[1:]]
    for name in names:
        group = re.match(r"--(\w+)\.", name)
        readers = _READ_BY.get(group[1]) if group else None
        if readers and command in _WITH_GROUPS and command not in readers:
            raise ValueError(
                f"{name} has no effect on {command}: it is for {' and '.join(readers)}. Leave it out"
            )
        if command == "export" and _NOT_OF_EXPORT.fullmatch(name) and _of_runs(arguments):
            raise ValueError(
                f"{name} has no effect on export, which writes the student of the checkpoint as the "
                "config.yaml of its run describes it, without teacher, loss and rows. Leave it out"
            )


_WITH_GROUPS = ("fit", "check", "validate", "test", "predict", "cache", "export")


def _of_runs(arguments: Sequence[str]) -> bool:
    """Return whether all configurations are what runs have left: these lack nothing."""
    words = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    files = [b for a, b in pairwise(words) if a in {"--config", "-c"}]
    return bool(files) and all(Path(file).name == "config.yaml" for file in files)
