"""What the k most likely tokens of student and teacher have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm


@dataclass(frozen=True)
class _Shared:
    """The k most likely tokens of each side that are among the other's, at the rows of a chunk."""

    share: Tensor
    """Number of the shared tokens over k, ``(n,)``."""
    student_mass: Tensor
    """Probability that the student gives to them, ``(n,)``."""
    teacher_mass: Tensor
    """Probability that the teacher gives to them, ``(n,)``."""


class _OverlapTerm(TokenTerm):
    """A number about the tokens that are among the k most likely of student and of teacher.

    Both at temperature 1, over the tokens that are compared. Of equally likely tokens at the end of
    the k, any may be among them.

    Args:
        k: Number of tokens of each side.

    Raises:
        ValueError: If k is below 1.
    """

    needs_teacher = True

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it is a number of tokens, 1 or more")
        self.k = k

    def shared(self, chunk: LogitsChunk) -> _Shared:
        """Return the shared tokens, found once for all terms with this k.

        Raises:
            ValueError: If the teacher's answer does not tell its k most likely tokens.
        """
        return chunk.once(("overlap", self.k), lambda: self._find(chunk))

    def _find(self, chunk: LogitsChunk) -> _Shared:
        own = chunk.student().detach()
        own_values, own_ids = own.topk(self.k, -1)
        their_ids, their_values = chunk.teacher_most_likely(self.k)
        # A mark at each token: comparing all pairs would take k times k numbers at each position.
        marks = torch.zeros(own.shape, dtype=torch.bool, device=own.device)
        of_student = marks.scatter(-1, their_ids, True).gather(-1, own_ids)
        of_teacher = marks.scatter_(-1, own_ids, True).gather(-1, their_ids)
        return _Shared(
            of_student.sum(-1).to(own.dtype) / self.k,
            own_values.exp().where(of_student, 0.0).sum(-1),
            their_values.to(own.dtype).exp().where(of_teacher, 0.0).sum(-1),
        )


class TopKOverlap(_OverlapTerm):
    r"""Share of the student's k most likely tokens that are among the teacher's.

    .. math:: \frac{|S_k(q) \cap S_k(p)|}{k}

    Example:
        >>> from lightning_kd.fused import DistributionRows
        >>> student = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
        >>> teacher = torch.tensor([[0.1, 0.6, 0.05, 0.25]]).log()
        >>> chunk = LogitsChunk(slice(0, 1), student, DistributionRows((teacher,)))
        >>> TopKOverlap(2).values(chunk)  # tokens 0 and 1, and 1 and 3
        tensor([0.5000])
        >>> StudentOverlapMass(2).values(chunk), TeacherOverlapMass(2).values(chunk)
        (tensor([0.3000]), tensor([0.6000]))
    """

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The share."""
        return self.shared(chunk).share


class StudentOverlapMass(_OverlapTerm):
    r"""The student's probability of the shared tokens, :math:`\sum_{v \in S_k(q) \cap S_k(p)} q(v)`."""

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum."""
        return self.shared(chunk).student_mass


class TeacherOverlapMass(_OverlapTerm):
    r"""The teacher's probability of the shared tokens, :math:`\sum_{v \in S_k(q) \cap S_k(p)} p(v)`."""

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum."""
        return self.shared(chunk).teacher_mass
