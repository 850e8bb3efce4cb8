"""Fields of a JSON request, each of its own type alone."""

from typing import Any

from lightning_kd.option_checks import is_number
from lightning_kd.serving.limits import RefusedError


def flag(given: dict[str, Any], name: str, default: bool) -> bool:
    """Take a truth value out of a request.

    Raises:
        RefusedError: If it is something else.
    """
    value = given.pop(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RefusedError(400, f"{name} is {value!r}; it must be true or false")
    return value


def number(given: dict[str, Any], name: str, default: float) -> float:
    """Take a number out of a request.

    Raises:
        RefusedError: If it is something else.
    """
    value = given.pop(name, default)
    if value is None:
        return default
    if not is_number(value):
        raise RefusedError(400, f"{name} is {value!r}; it must be a number")
    return float(value)


def integer(
    given: dict[str, Any], name: str, default: int | None, least: int, most: int
) -> int | None:
    """Take an integer within bounds out of a request.

    Raises:
        RefusedError: If it is something else.
    """
    value = given.pop(name, default)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RefusedError(
            400, f"{name} is {value!r}; it must be an integer from {least} to {most}"
        )
    return value
