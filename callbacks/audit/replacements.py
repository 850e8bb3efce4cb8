"""Temporary replacement of attributes."""

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

_MISSING: Any = object()


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of an object until the context exits; then restore or remove each.

    An attribute of the class, such as a method, is hidden by an attribute of the object, which is
    removed on exit. A property is set, and on exit set to its previous value.

    Args:
        owner: The object.
        values: The attributes by name.

    Example:
        >>> class Settings:
        ...     rate = 1
        >>> settings = Settings()
        >>> with replaced(settings, rate=2):
        ...     settings.rate
        2
        >>> settings.rate, vars(settings)
        (1, {})
    """
    with ExitStack() as replacements:
        for name, value in values.items():
            before = _saved(owner, name)
            setattr(owner, name, value)
            replacements.callback(_put_back, owner, name, before)
        yield


@contextmanager
def restored(owner: Any, *names: str) -> Iterator[None]:
    """Restore attributes of an object when the context exits."""
    with replaced(owner, **{name: getattr(owner, name) for name in names}):
        yield


@contextmanager
def replaced_item(mapping: MutableMapping[str, str], key: str, value: str) -> Iterator[None]:
    """Replace the value of an existing key until the context exits."""
    before = mapping.get(key)
    if before is None:
        yield
        return
    mapping[key] = value
    try:
        yield
    finally:
        mapping[key] = before


def _saved(owner: Any, name: str) -> Any:
    if hasattr(getattr(type(owner), name, None), "__set__"):
        return getattr(owner, name)
    return vars(owner).get(name, _MISSING)


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)
