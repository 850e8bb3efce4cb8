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
        ValueError: schedule is 'Linear'; give an instance of int, such as Linear(steps=300)
    """
    if not isinstance(value, kind):
        came = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(
            f"{name} is {came}; give an instance of {kind.__name__}, such as {example}"
        )


def check_whole(name: str, value: object, otherwise: str = "") -> None:
    """Validate an option that is a whole number of 1 or more.

    Args:
        name: The option.
        value: What came.
        otherwise: What else the option may be, for the message.

    Raises:
        ValueError: If it is none.

    Example:
        >>> check_whole("slots", 2.5)
        Traceback (most recent call last):
        ValueError: slots is 2.5; it must be a whole number, 1 or more
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more{otherwise}")


def is_number(value: object, *, whole: bool = False) -> bool:
    """Return whether a value is a number, and not True or False.

    Example:
        >>> is_number(8), is_number("8"), is_number(True), is_number(8.5, whole=True)
        (True, False, False, False)
    """
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def require_positive(**options: float) -> None:
    """Refuse an option that must be above 0, such as a temperature.

    Raises:
        ValueError: If one is not positive.
    """
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
