"""What decides the code of a term, and how a message names it."""

from types import FunctionType
from typing import Any

from lightning_kd.divergences import Divergence
from lightning_kd.fused.logits_chunk import TokenTerm


def kind_of(value: object) -> Any:
    """What of a term decides its code, but for numbers and shapes."""
    if isinstance(value, TokenTerm | Divergence):
        return (type(value), *(kind_of(own) for own in vars(value).values()))
    if isinstance(value, tuple):
        return tuple(kind_of(part) for part in value)
    return value.__code__ if isinstance(value, FunctionType) else type(value)


def described(term: TokenTerm) -> str:
    """Return the name of a term, and its divergence, if it has one."""
    divergence = getattr(term, "divergence", None)
    name = type(term).__name__
    return f"{name} of {divergence!r}" if isinstance(divergence, Divergence) else name
