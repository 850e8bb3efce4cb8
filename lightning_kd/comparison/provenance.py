"""What a report says of where its numbers come from, without a user's own directories."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLACES = ("--output", "--write")
"""Options that say where things go, and change none of them."""


def shown_command(words: Sequence[str]) -> list[str]:
    """Return a command as a report shows it.

    A value of ``--set`` with an absolute path or the home directory is written ``...``, absolute
    ``--output`` and ``--write`` are left out, and of other absolute paths the name is left.

    Args:
        words: As typed.

    Example:
        >>> shown_command(["compare", "--set", "data=/home/alice/data", "--output=/scratch/x"])
        ['compare', '--set', 'data=...']
    """
    # An option and its value may be one word or two.
    split = [part for word in words for part in _option_and_value(word)]
    shown: list[str] = []
    for place, word in enumerate(split):
        before = split[place - 1] if place else ""
        name, equals, value = word.partition("=")
        if before == "--set" and equals and _own_place(value):
            shown.append(f"{name}=...")
        elif before in _PLACES and _own_place(word):
            shown.pop()
        elif before != "--set" and _own_place(word):
            shown.append(f".../{Path(word).name}")
        else:
            shown.append(word)
    return shown


def without_places(text: str, output: Path) -> str:
    """Return an error with paths from the output directory on, and ``~`` for the home directory.

    Example:
        >>> without_places("failed (runs/x/SFT/0/log.txt)", Path("runs/x"))
        'failed (SFT/0/log.txt)'
    """
    text = re.sub(rf"(?<![\w./-]){re.escape(str(output))}/", "", text)
    return text.replace(_home(), "~")


def made_differently(results: Sequence[Mapping[str, Any]]) -> str:
    """Return in what the runs of a table were made differently, in a line; empty if in nothing.

    Args:
        results: Those of the table.

    Example:
        >>> made_differently([{"device": "cpu", "jobs": 1}, {"device": "cpu", "jobs": 2}])
        'The runs of this table were made differently: jobs 1 and 2.'
    """
    conditions = [_conditions(result) for result in results]
    names = dict.fromkeys(name for each in conditions for name in each)
    parts = []
    for name in names:
        found = sorted({str(each.get(name, "unknown")) for each in conditions})
        if len(found) > 1:
            parts.append(f"{name} {' and '.join(found)}")
    return f"The runs of this table were made differently: {'; '.join(parts)}." if parts else ""


def versions_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the versions that runs were made with.

    Example:
        >>> versions_of([{"versions": {"torch": "2.6"}}, {"versions": {"torch": "2.7"}}])
        'torch 2.6 and 2.7'
    """
    names = dict.fromkeys(name for result in results for name in result["versions"])
    found = {n: sorted({str(r["versions"].get(n, "unknown")) for r in results}) for n in names}
    return ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in found.items())


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return under what a run was made; results of older versions lack some of it."""
    conditions = {**result.get("versions", {})}
    conditions |= {n: result[n] for n in ("jobs", "threads", "device") if result.get(n) is not None}
    if result.get("sources"):
        # One digest, or several of a run that has gone on with others.
        conditions["sources"] = ", ".join(each[:8] for each in result["sources"].split(", "))
    return conditions


def _option_and_value(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def _own_place(text: str) -> bool:
    """Return whether a text has an absolute path, by itself or in a list, or the home directory."""
    inside = re.search(r"(?:^|[\s\[\]{},\"'])[/~]", text) is not None
    return inside or _home() in text


def _home() -> str:
    """Return the home directory; a text that nothing contains where that is the root."""
    home = str(Path.home())
    return home if home != "/" else "\0"
