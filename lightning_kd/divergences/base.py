"""The contract of a divergence, and the registry of names."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_kd.divergences.log_space import softmax_gradient, value_and_gradient
from lightning_kd.imports import why_no_class
from lightning_kd.resuming import Resumable

ENTRY_POINT_GROUP = "lightning_kd.divergences"


class Divergence(Resumable, ABC):
    r"""A divergence between two categorical distributions, per position.

    Student first, everywhere. Calling an instance checks the shapes, detaches the teacher and
    evaluates :meth:`value` in float32 or wider. The result is in nats, neither masked nor reduced,
    and 0 where the two distributions are equal, up to rounding, and nowhere else.

    A subclass, a custom divergence too, writes :meth:`value`; it may also write
    :meth:`value_and_logit_gradient` in closed form, which is faster and lighter than the automatic
    one. A probability may be 0 (a log-probability of ``-inf``), on both sides at once: let such a token
    contribute 0. Hyper-parameters (``beta``, ``alpha``) are arguments of the subclass, checked in its
    ``__init__``.

    Example:
        >>> import torch
        >>> class ChiSquare(Divergence):
        ...     def value(self, student_log_probs, teacher_log_probs):
        ...         log_ratio = teacher_log_probs - student_log_probs
        ...         log_ratio = log_ratio.masked_fill(teacher_log_probs == -torch.inf, 0.0)
        ...         return (teacher_log_probs + log_ratio).exp().sum(-1) - 1
        >>> student = torch.log(torch.tensor([0.5, 0.5, 0.0]))
        >>> teacher = torch.log(torch.tensor([0.9, 0.1, 0.0]))
        >>> ChiSquare()(student, teacher)
        tensor(0.6400)
    """

    name: ClassVar[str] = ""
    """The registered name; loggers show it. Empty where no class it derives from is registered."""

    order: ClassVar[float] = 2
    r"""Power of the difference of logits with which the divergence vanishes as student and teacher
    become equal. So its gradient shrinks as :math:`\tau^{-order}` when both are softened
    by a temperature, which methods compensate. 2 wherever it is twice differentiable at equality, as
    all f-divergences with a smooth f are; a class of one's own with a kink there says 1."""

    def __call__(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """Evaluate the divergence at every position.

        Args:
            student_log_probs: Log-probabilities, shape ``(..., V)``. Gradients flow here.
            teacher_log_probs: Same shape; treated as constant.

        Returns:
            Divergence in nats, shape ``(...)``, float32 or wider.

        Raises:
            ValueError: If the shapes differ, or :meth:`value` does not return one number a position.
        """
        if student_log_probs.shape != teacher_log_probs.shape:
            raise ValueError(
                f"student_log_probs has shape {tuple(student_log_probs.shape)}, teacher_log_probs "
                f"{tuple(teacher_log_probs.shape)}: a divergence needs the same positions and the "
                "same vocabulary on both sides"
            )
        return self._checked_value(_wide(student_log_probs), _wide(teacher_log_probs.detach()))

    def _checked_value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        value = self.value(student_log_probs, teacher_log_probs)
        if not isinstance(value, Tensor) or value.shape != student_log_probs.shape[:-1]:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{type(self).__name__}.value has returned {came} for log-probabilities of shape "
                f"{tuple(student_log_probs.shape)}; return one number for each position: sum over the "
                "last axis alone"
            )
        return value

    @abstractmethod
    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The formula, over the last axis: ``(..., V), (..., V) -> (...)``."""

    def value_and_logit_gradient(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""The value, and its gradient in the student's logits: ``(..., V) x 2 -> (...), (..., V)``.

        With :math:`q = \mathrm{softmax}(z)` and :math:`g = \partial D / \partial \log q`, the
        softmax gives :math:`\partial D / \partial z_i = g_i - q_i \sum_v g_v`. This default obtains
        :math:`g` by automatic differentiation; a closed form overrides it.
        """
        student, teacher = _wide(student_log_probs), _wide(teacher_log_probs.detach())
        value, slope = value_and_gradient(lambda own: self._checked_value(own, teacher), student)
        if slope is None:
            raise ValueError(
                f"{type(self).__name__}.value does not depend on student_log_probs, so nothing "
                "could be learned from it; compute it from them, and do not detach them"
            )
        return value, softmax_gradient(slope, student.detach())

    def __repr__(self) -> str:
        """Class and hyper-parameters, as one would write them."""
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


def _wide(log_probs: Tensor) -> Tensor:
    """Float32 at least: in bfloat16 a log-softmax over 32,000 tokens is off by more than the KL."""
    return log_probs if log_probs.dtype == torch.float64 else log_probs.float()


_REGISTRY: dict[str, type[Divergence]] = {}

D = TypeVar("D", bound=type[Divergence])


def register_divergence(name: str) -> Callable[[D], D]:
    """Class decorator: make a :class:`Divergence` available under ``name``.

    Raises:
        ValueError: If another class already has the name.
    """

    def register(cls: D) -> D:
        known = _REGISTRY.get(name)
        if known is not None and f"{known.__module__}.{known.__qualname__}" != (
            f"{cls.__module__}.{cls.__qualname__}"
        ):
            raise ValueError(
                f"the divergence name {name!r} is taken by {known.__module__}.{known.__qualname__}"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def available_divergences() -> list[str]:
    """Registered names, sorted, those of installed entry points included.

    Example:
        >>> {"forward_kl", "generalized_jsd", "reverse_kl"} <= set(available_divergences())
        True
    """
    return sorted({*_REGISTRY, *_entry_points()})


def make_divergence(divergence: "Divergence | str", **parameters: float | bool) -> Divergence:
    """Build a divergence from its name, or hand an instance back.

    Args:
        divergence: A registered name, the name of a registered class, or a ready instance.
        parameters: Hyper-parameters for a name; an instance has its own already.

    Raises:
        ValueError: If it is neither, the name is unknown (the nearest and the choices are named), or
            parameters come with an instance.

    Example:
        >>> make_divergence("generalized_jsd", beta=0.1)
        GeneralizedJSD(beta=0.1, normalized=False)
    """
    if isinstance(divergence, Divergence):
        if parameters:
            raise ValueError(f"{divergence!r} is built already: {sorted(parameters)} came too late")
        return divergence
    if not isinstance(divergence, str):
        raise ValueError(
            f"divergence is {divergence!r}; give a name or an instance, such as ReverseKL()"
        )
    cls = _REGISTRY.get(divergence) or _find_class(divergence)
    return cls(**parameters)


def _class_names() -> dict[str, str]:
    """Registered names of the classes, by those that they have in Python, where only one has it."""
    names = [cls.__name__ for cls in _REGISTRY.values()]
    return {c.__name__: n for n, c in _REGISTRY.items() if names.count(c.__name__) == 1}


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _find_class(name: str) -> type[Divergence]:
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        cls: type[Divergence] = point.load()
        if not (inspect.isclass(cls) and issubclass(cls, Divergence)):
            raise ValueError(
                f"the entry point {name!r} = {point.value} is not a subclass of Divergence"
            )
        return register_divergence(name)(cls)
    by_class = _class_names()
    if name in by_class:
        return _REGISTRY[by_class[name]]
    reason = why_no_class(name, "Divergence") if "." in name else ""
    if reason:
        raise ValueError(f"unknown divergence {name!r}: {reason}")
    known = {each.lower(): each for each in available_divergences()}
    known |= {cls.lower(): each for cls, each in by_class.items()}
    near = get_close_matches(name.lower(), known, n=1)
    meant = f"did you mean {known[near[0]]}? " if near else ""
    raise ValueError(
        f"unknown divergence {name!r}; {meant}choose one of {', '.join(available_divergences())}, "
        "or pass an instance of your own subclass of lightning_kd.divergences.Divergence"
    )
