"""A teacher's answer in a chunk: log-probabilities of tokens, or of groups of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_kd.divergences import Divergence
from lightning_kd.fused.student_rows import StudentRows

Combine = Callable[[Sequence[Tensor], float], Tensor]
"""The logits of a teacher's models and a temperature -> its log-probabilities."""


def single_model_log_probs(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """The log-softmax of the only logits there are."""
    (only,) = logits
    return (only if temperature == 1 else only / temperature).log_softmax(-1)


class TeacherRows(ABC):
    """A teacher's answer at the rows of a chunk.

    Most are distributions over events: a partition of the vocabulary, in an order that student and
    teacher share.
    """

    @abstractmethod
    def events(
        self, student: StudentRows, student_temperature: float, teacher_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the events: the student's and the teacher's, ``(n, E)`` each.

        The student's are differentiable in its logits.

        Raises:
            ValueError: If the answer is no distribution, or not known at the temperature.
        """

    def divergence(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> Tensor:
        """Return the divergence of the distributions over events, ``(n,)``, differentiable."""
        return divergence(*self.events(student, student_temperature, teacher_temperature))

    @abstractmethod
    def divergence_and_gradient(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence, ``(n,)``, and its gradient in the student's logits, ``(n, V)``."""

    @abstractmethod
    def top_tokens(self) -> Tensor:
        """The teacher's most likely token at each row, ``(n,)``."""

    def most_likely(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most likely tokens, and their log-probabilities at temperature 1, ``(n, k)`` each.

        Raises:
            ValueError: If the answer does not tell them.
        """
        raise ValueError(f"{type(self).__name__} does not tell the {k} most likely tokens")


class DistributionRows(TeacherRows):
    """Every token is an event of its own.

    Args:
        logits: Of each of the teacher's models, ``(n, V)``.
        combine: How they become log-probabilities at a temperature.
    """

    def __init__(self, logits: Sequence[Tensor], combine: Combine = single_model_log_probs) -> None:
        self._logits, self._combine = logits, combine
        self._log_probs: dict[float, Tensor] = {}

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """The combined log-probabilities, ``(n, V)``, computed once for each temperature."""
        if temperature not in self._log_probs:
            with torch.no_grad():
                self._log_probs[temperature] = self._combine(self._logits, temperature)
        return self._log_probs[temperature]

    def log_normalizer(self, source: int) -> Tensor:
        """The logarithm of the softmax denominator of one model, ``(n,)``."""
        return self._logits[source].logsumexp(-1)

    def unnormalized(self, temperature: float) -> tuple[Tensor, float]:
        """Return a tensor and a factor: the log-softmax of their product is :meth:`log_probs`."""
        if self._combine is single_model_log_probs:
            (only,) = self._logits
            return only, 1 / temperature
        return self.log_probs(temperature), 1.0

    def events(
        self, student: StudentRows, student_temperature: float, teacher_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of all tokens."""
        own = student.log_probs(student_temperature)
        return own, self.log_probs(teacher_temperature).to(own.dtype)

    def divergence_and_gradient(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence and its closed form, where it has one."""
        values, gradient = divergence.value_and_logit_gradient(
            *self.events(student, student_temperature, teacher_temperature)
        )
        return values, gradient if student_temperature == 1 else gradient / student_temperature

    def top_tokens(self) -> Tensor:
        """The most likely token."""
        return self.log_probs(1.0).argmax(-1)

    def most_likely(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most likely tokens, and their log-probabilities."""
        best = self.log_probs(1.0).topk(k, -1)
        return best.indices, best.values
