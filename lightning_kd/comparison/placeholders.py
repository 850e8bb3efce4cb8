"""Words in braces in an experiment file, and what stands there in a run."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_WORD = re.compile(r"(?<![{%$\\])\{([A-Za-z_][\w.,=+-]*)\}(?!\})")

_TEMPLATES = frozenset({"prompt_template", "chat_template"})
"""Options whose braces are of the data."""


def placeholders(part: Any) -> Iterator[str]:
    """Yield the names of all placeholders in the values of a configuration.

    Example:
        >>> list(placeholders({"train": "{data}/a.txt", "prompt_template": "{question}"}))
        ['data']
    """
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name not in _TEMPLATES:
                yield from placeholders(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from placeholders(value)
    elif isinstance(part, str):
        yield from _WORD.findall(part)


def fill(part: Any, values: Mapping[str, Any]) -> Any:
    """Return a configuration with the placeholders filled in.

    A value that is a placeholder and nothing else takes the type of what is filled in.

    Args:
        part: The configuration, or part of one.
        values: By name; has all of them.

    Example:
        >>> fill({"max_steps": "{steps}", "train": ["{data}/a.txt"]}, {"steps": 5, "data": "d"})
        {'max_steps': 5, 'train': ['d/a.txt']}
    """
    if isinstance(part, Mapping):
        return {n: v if n in _TEMPLATES else fill(v, values) for n, v in part.items()}
    if isinstance(part, list | tuple):
        return [fill(value, values) for value in part]
    if not isinstance(part, str):
        return part
    whole = _WORD.fullmatch(part)
    if whole:
        return values[whole[1]]
    return _WORD.sub(lambda found: str(values[found[1]]), part)
