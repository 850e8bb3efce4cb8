"""Comparison of the most likely tokens of student and teacher."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_kd.fused import (
    FullDistribution,
    StudentOverlapMass,
    TeacherAnswer,
    TeacherOverlapMass,
    TokenTerm,
    TopK,
    TopKOverlap,
)


@dataclass(frozen=True)
class Overlap:
    """How many of their most likely tokens student and teacher are compared by.

    Example:
        >>> from lightning_kd.fused import MaterializedLogits, TopK
        >>> import torch
        >>> answer = TopK(torch.tensor([[5, 2]]), torch.tensor([[0.5, 0.25]]).log())
        >>> Overlap(2).is_told_by(answer), Overlap(3).is_told_by(answer)
        (True, False)
    """

    names: ClassVar = ("top_k_overlap", "student_overlap_mass", "teacher_overlap_mass")

    k: int
    """Tokens of each side."""
    is_required: bool = False
    """Whether an answer that does not tell so many is refused; otherwise nothing is compared."""

    def is_told_by(self, teacher: TeacherAnswer) -> bool:
        """Return whether an answer tells the teacher's k most likely tokens."""
        if isinstance(teacher, FullDistribution):
            return self.k <= min(source.shape[1] for source in teacher.logits)
        return isinstance(teacher, TopK) and self.k <= teacher.token_ids.shape[1]

    def check(self, teacher: TeacherAnswer) -> None:
        """Refuse an answer that does not tell the tokens, if it has to.

        Raises:
            ValueError: If it does not.
        """
        if self.is_required and not self.is_told_by(teacher):
            raise ValueError(
                f"on_policy.health.overlap_k is {self.k}, and the teacher's {teacher.kind} does not "
                f"tell its {self.k} most likely tokens at each position; lower it, or leave it out"
            )

    def token_terms(self, teacher: TeacherAnswer) -> list[TokenTerm]:
        """Return the terms to evaluate, in the order of ``names``; none if they cannot be."""
        if not self.is_told_by(teacher):
            return []
        return [TopKOverlap(self.k), StudentOverlapMass(self.k), TeacherOverlapMass(self.k)]
