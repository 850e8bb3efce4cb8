"""Files of fixed names that runs write outside of their directories."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_kd.comparison.options import flat

_WRITERS = {"DocumentLikelihoods": "documents.jsonl", "OnPolicyGeneration": None}
"""Callbacks whose ``path`` is a file that they write, and where by themselves."""


def written_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the files that a run writes beside those in its directory, by option.

    Args:
        config: All options.

    Example:
        >>> written_files({"on_policy": {"path": "completions.jsonl"}})
        {'on_policy.path': 'completions.jsonl'}
    """
    options = flat(config)
    found = {"on_policy.path": options.get("on_policy.path")}
    for name, value in options.items():
        writer = str(value).rpartition(".")[2]
        if name.endswith(".class_path") and writer in _WRITERS:
            option = f"{name.removesuffix('class_path')}init_args.path"
            found[option] = options.get(option) or _WRITERS[writer]
    return {name: path for name, path in found.items() if path is not None}


def check_written(runs: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Validate that no two runs write one file.

    Args:
        runs: Title of each, its training and its test.

    Raises:
        ValueError: If two do.
    """
    writers: dict[str, str] = {}
    for title, fit, test in runs:
        for name, path in [*written_files(fit).items(), *written_files(test).items()]:
            place = os.path.abspath(os.path.expanduser(path))
            if writers.setdefault(place, title) != title:
                raise ValueError(
                    f"{name} is {path} in two runs ({writers[place]}, and {title}); give each a file "
                    "of its own, with {seed} in its name; in a test, {student}_documents.jsonl is in "
                    "the directory of the run"
                )
