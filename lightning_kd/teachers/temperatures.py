"""Temperatures at which what teachers answer holds."""

from lightning_kd.fused import AnswerKind
from lightning_kd.teachers.contract import Teacher


def temperatures_of(teacher: Teacher, kind: AnswerKind) -> frozenset[float] | None:
    """Return the temperatures at which a kind of a teacher's answers holds; None for any.

    Example:
        >>> class Softened(Teacher):
        ...     answers = frozenset({"top_k", "sampled"})
        ...     temperatures = frozenset({1.0, 2.0})
        ...     vocabulary_size = 18
        ...     def answer(self, batch, positions, *, kind, logits_backend): ...
        >>> sorted(temperatures_of(Softened(), "top_k")), sorted(temperatures_of(Softened(), "sampled"))
        ([1.0, 2.0], [1.0])
    """
    if kind == "full_distribution":
        return None
    return teacher.temperatures if kind in ("top_k", "top_k_and_token") else frozenset({1.0})
