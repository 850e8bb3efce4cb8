"""Options that are one of a few words."""

from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Validate an option that is one of a few words.

    Args:
        name: The option.
        value: What came.
        choices: What there is.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> check_choice("action", "wait", ("stop", "skip"))
        Traceback (most recent call last):
        ValueError: unknown action 'wait'; choose one of ('stop', 'skip')
    """
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {tuple(choices)}")
