"""Whether the value of an option is of the right kind."""

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


def check_instance(name: str, value: object, kind: type, example: str) -> None:
    """Validate an option that is an object of a class, and not the class or its name.

    Args:
        name: The option.
        value: What came.
        kind: The class.
        example: How one is made.

    Raises:
        ValueError: If it is no such object.

    Example:
        >>> check_instance("schedule", "Linear", int, "Linear(steps=300)")
        Traceback (most recent call last):
        ValueError: schedule is 'Linear'; give an object, such as Linear(steps=300)
    """
    if not isinstance(value, kind):
        came = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} is {came}; give an object, such as {example}")


def is_number(value: object, *, whole: bool = False) -> bool:
    """Return whether a value is a number, and not True or False.

    Example:
        >>> is_number(8), is_number("8"), is_number(True), is_number(8.5, whole=True)
        (True, False, False, False)
    """
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)
