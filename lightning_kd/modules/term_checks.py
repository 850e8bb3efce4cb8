"""Whether a method's terms are what the base class can add up."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_kd.fused import TokenTerm
from lightning_kd.modules.loss import LossTerm


def term_names(method: type, names: object) -> tuple[str, ...]:
    """Return the names of a method's terms.

    Args:
        method: The method's class.
        names: What it states as ``terms``; None if nothing.

    Raises:
        ValueError: If they are not a tuple of names, or the class does not define ``loss_terms``.
    """
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{method.__name__}.terms is {names!r}; give a tuple of the names of its terms, such as "
            'terms = ("divergence",)'
        )
    if getattr(getattr(method, "loss_terms", None), "__isabstractmethod__", False):
        raise ValueError(
            f"{method.__name__} does not define loss_terms, which returns one LossTerm for each of "
            f"{list(names)}"
        )
    return tuple(names)


def by_name(terms: object, names: Sequence[str], method: str) -> dict[str, LossTerm]:
    """Put terms in the order of their names.

    Args:
        terms: As a method returned them.
        names: As the method's class states them.
        method: For the message.

    Raises:
        ValueError: If they are no mapping of names to terms, a term is missing or is not one of the
            names.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(
            f"the loss of {method} is {_kind(terms)}; loss_terms returns a mapping with one LossTerm "
            f"for each of {list(names)}"
        )
    missing = [name for name in names if name not in terms]
    unknown = [name for name in terms if name not in names]
    if missing or unknown:
        raise ValueError(
            f"the loss of {method} has the terms {sorted(terms)}, the class states "
            f"{sorted(names)}: missing {missing}, unknown {unknown}. Return one LossTerm for each "
            "name, with coefficient 0 where there is nothing to add"
        )
    for name in names:
        _check_term(name, terms[name], method)
    return {name: terms[name] for name in names}


def _check_term(name: str, term: object, method: str) -> None:
    if not isinstance(term, LossTerm):
        raise ValueError(
            f"the term {name} of {method} is {_kind(term)}; return LossTerm(term, coefficient)"
        )
    if not isinstance(term.per_token, TokenTerm | Tensor):
        raise ValueError(
            f"the term {name} of {method} holds {_kind(term.per_token)}; give LossTerm a TokenTerm, "
            "such as DivergenceTerm, or a tensor with one value for each position"
        )
    weight: object = term.coefficient  # in a class without types it may be anything
    if not isinstance(weight, int | float):
        raise ValueError(
            f"the term {name} of {method} has the coefficient {weight!r}; give a number"
        )


def _kind(value: object) -> str:
    return "None (is a return missing?)" if value is None else f"a {type(value).__name__}"
