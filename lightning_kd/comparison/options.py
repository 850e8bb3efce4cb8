"""Options of a configuration, each under its whole name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def differences(before: Path, now: Mapping[str, Any]) -> str:
    """Return the options that differ, in a line."""
    try:
        old, new = flat(yaml.safe_load(before.read_text())), flat(now)
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return f"{before} is not what was written"
    names = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    shown = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names[:3]]
    return ", ".join([*shown, *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])


def flat(part: Any, name: str = "") -> dict[str, Any]:
    """Return the values of a configuration by their options.

    Args:
        part: The configuration, or part of one.
        name: Option of the part.

    Example:
        >>> flat({"a": {"b": 1}, "c": [2, 3]})
        {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    if isinstance(part, list):
        part = {str(index): value for index, value in enumerate(part)}
    if not isinstance(part, Mapping) or not part:
        return {name: part}
    found: dict[str, Any] = {}
    for key, value in part.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found
