"""A chunk of logits, and the terms that are computed from it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_kd.fused.teacher_rows import DistributionRows, TeacherRows


class LogitsChunk:
    """A chunk of logits, and the log-probabilities that several terms use.

    Args:
        rows: The chunk's positions among all scored ones.
        student_logits: ``(n, V)``; ``(n, 0)`` if only the teacher is evaluated.
        teacher: The teacher's answer there; None if no term needs it.
    """

    def __init__(
        self, rows: slice, student_logits: Tensor, teacher: TeacherRows | None = None
    ) -> None:
        self.rows = rows
        self.student_logits = student_logits
        self._teacher = teacher
        self._student: dict[float, Tensor] = {}
        self._events: dict[float, Tensor] = {}

    def student(self, temperature: float = 1.0) -> Tensor:
        """The student's log-probabilities, ``(n, V)``."""
        if temperature not in self._student:
            logits = self.student_logits if temperature == 1 else self.student_logits / temperature
            self._student[temperature] = logits.log_softmax(-1)
        return self._student[temperature]

    def teacher(self, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities of all tokens, ``(n, V)``, without a gradient.

        Raises:
            ValueError: If the teacher does not tell them all.
        """
        if not isinstance(self._teacher, DistributionRows):
            raise ValueError(
                "this term needs the teacher's log-probability of every token, and the teacher does "
                "not answer full_distribution; say so in the needs of the method"
            )
        return self._teacher.log_probs(temperature)

    def events(
        self, student_temperature: float = 1.0, teacher_temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher over the events of the teacher's answer.

        Every token is an event of its own or, where the teacher names k tokens only, all others are
        one event.

        Returns:
            Those of the student and of the teacher, ``(n, E)`` each.
        """
        student = self._student_events(student_temperature)
        return student, self._answer.log_probs(teacher_temperature).to(student.dtype)

    def to_logits(self, gradient: Tensor, student_temperature: float = 1.0) -> Tensor:
        """Take a gradient in the logits of :meth:`events` to the tempered ones of all tokens."""
        student = self.student(student_temperature)
        return self._answer.to_logits(gradient, student, self._student_events(student_temperature))

    def teacher_top_tokens(self) -> Tensor:
        """The teacher's most likely token at each row, ``(n,)``."""
        return self._answer.top_tokens()

    def on(self, student_logits: Tensor) -> "LogitsChunk":
        """Return the chunk with other logits of the student."""
        return LogitsChunk(self.rows, student_logits, self._teacher)

    def _student_events(self, temperature: float) -> Tensor:
        if temperature not in self._events:
            self._events[temperature] = self._answer.events_of(self.student(temperature))
        return self._events[temperature]

    @property
    def _answer(self) -> TeacherRows:
        assert self._teacher is not None  # a term that needs a teacher says so
        return self._teacher

    def without_gradient_where(self, weight: Tensor) -> "LogitsChunk":
        """Return the chunk without gradient at rows of weight 0.

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
        >>> block = LogitsChunk(slice(0, 1), torch.zeros(1, 4))
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
