"""Some rows of logits, and what a quantity makes of them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_kd.fused.lazy_logits import Combine


class LogitsChunk:
    """Some rows of logits, and the log-probabilities that several quantities ask for.

    Args:
        rows: Where the block stands among all scored positions.
        student_logits: ``(n, V)``; ``(n, 0)`` where only the teacher is looked at.
        teacher_logits: The same for each model of the teacher; empty where nothing asks.
        combine: How the teacher's logits become log-probabilities at a temperature.
    """

    def __init__(
        self,
        rows: slice,
        student_logits: Tensor,
        teacher_logits: tuple[Tensor, ...],
        combine: Combine | None,
    ) -> None:
        self.rows = rows
        self.student_logits = student_logits
        self._teacher_logits, self._combine = teacher_logits, combine
        self._student: dict[float, Tensor] = {}
        self._teacher: dict[float, Tensor] = {}

    def student(self, temperature: float = 1.0) -> Tensor:
        """The student's log-probabilities, ``(n, V)``."""
        if temperature not in self._student:
            logits = self.student_logits if temperature == 1 else self.student_logits / temperature
            self._student[temperature] = logits.log_softmax(-1)
        return self._student[temperature]

    def teacher(self, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities, ``(n, V)``, without a gradient."""
        if temperature not in self._teacher:
            assert self._combine is not None  # a quantity that needs a teacher says so
            with torch.no_grad():
                self._teacher[temperature] = self._combine(self._teacher_logits, temperature)
        return self._teacher[temperature]

    def on(self, student_logits: Tensor) -> "LogitsChunk":
        """The same block over other logits of the student."""
        chunk = LogitsChunk(self.rows, student_logits, self._teacher_logits, self._combine)
        chunk._teacher = self._teacher
        return chunk

    def without_gradient_where(self, weight: Tensor) -> "LogitsChunk":
        """The same block, whose rows with a weight of 0 have no gradient.

        Not even that of an infinite value, which times 0 would be NaN.
        """
        muted = weight == 0
        if not muted.any():
            return self
        logits = self.student_logits
        return self.on(torch.where(muted[:, None], logits.detach(), logits))


class TokenTerm(ABC):
    """A number at each scored position that depends on the logits there, and on no others.

    A subclass writes :meth:`values`; its gradient in closed form is optional.

    Example:
        >>> class Confidence(TokenTerm):
        ...     def values(self, block):
        ...         return block.student().exp().amax(-1)
        >>> block = LogitsChunk(slice(0, 1), torch.zeros(1, 4), (), None)
        >>> Confidence().values(block)
        tensor([0.2500])
    """

    needs_teacher: bool = False

    @abstractmethod
    def values(self, chunk: LogitsChunk) -> Tensor:
        """The formula, differentiable in the student's logits: ``(n,)``."""

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """Values and their gradient in the student's logits: ``(n,), (n, V)``."""
        with torch.enable_grad():
            leaf = chunk.student_logits.detach().requires_grad_()
            values = self.values(chunk.on(leaf))
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient
