"""A chunk of logits, and the terms that are computed from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_kd.devices import is_queued
from lightning_kd.divergences import Divergence
from lightning_kd.divergences.log_space import expectation, value_and_gradient
from lightning_kd.fused.sparse_rows import SampledRows
from lightning_kd.fused.student_rows import StudentRows
from lightning_kd.fused.teacher_rows import DistributionRows, TeacherRows

_Result = TypeVar("_Result")


class LogitsChunk:
    """A chunk of logits, and the log-probabilities that several terms use.

    Args:
        rows: The chunk's positions among all scored ones, to look up what a term has at each; in
            compiled code their numbers, which a tensor takes as it takes a slice.
        student_logits: ``(n, V)``; ``(n, 0)`` if only the teacher is evaluated.
        teacher: The teacher's answer there; None if no term needs it.
    """

    def __init__(
        self, rows: slice, student_logits: Tensor, teacher: TeacherRows | None = None
    ) -> None:
        self.rows = rows
        self._student, self._teacher = StudentRows(student_logits), teacher
        self._computed: dict[Hashable, Any] = {}

    @property
    def student_logits(self) -> Tensor:
        """The student's logits, ``(n, V)``."""
        return self._student.logits

    def let_overwrite(self) -> None:
        """Let the next gradient take the place of the logits, which nothing reads after it."""
        self._student.may_be_overwritten = True

    def student(self, temperature: float = 1.0) -> Tensor:
        """The student's log-probabilities, ``(n, V)``."""
        return self._student.log_probs(temperature)

    def teacher(self, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities of all tokens, ``(n, V)``, without a gradient.

        Raises:
            ValueError: If the teacher does not tell them all, or the term has not asked for it.
        """
        return self._distribution.log_probs(temperature)

    def teacher_log_normalizer(self, source: int) -> Tensor:
        """The logarithm of the softmax denominator of one of the teacher's models, ``(n,)``.

        Args:
            source: Its number among the answer's sources.

        Raises:
            ValueError: As :meth:`teacher`.
        """
        return self._distribution.log_normalizer(source)

    def events(
        self, student_temperature: float = 1.0, teacher_temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher over the events of the teacher's answer.

        Every token is an event of its own or, where the teacher names k tokens only, all others are
        one event.

        Returns:
            Those of the student and of the teacher, ``(n, E)`` each.

        Raises:
            ValueError: If the answer is no distribution.
        """
        return self._answer.events(self._student, student_temperature, teacher_temperature)

    def divergence(
        self,
        divergence: Divergence,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> Tensor:
        """Return a divergence from the teacher over the events of its answer, ``(n,)``.

        From tokens drawn at random it is the unbiased estimate of the forward KL.

        Raises:
            ValueError: If the answer does not tell the divergence.
        """
        return self._answer.divergence(
            divergence, self._student, student_temperature, teacher_temperature
        )

    def divergence_and_gradient(
        self,
        divergence: Divergence,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the same, and its gradient in the student's logits: ``(n,), (n, V)``."""
        return self._answer.divergence_and_gradient(
            divergence, self._student, student_temperature, teacher_temperature
        )

    def teacher_top_tokens(self) -> Tensor:
        """The teacher's most likely token at each row, ``(n,)``."""
        return self._answer.top_tokens()

    def teacher_most_likely(self, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's k most likely tokens, and their log-probabilities, ``(n, k)`` each.

        Raises:
            ValueError: If the answer does not tell them.
        """
        return self._answer.most_likely(k)

    def once(self, key: Hashable, compute: Callable[[], _Result]) -> _Result:
        """Return what several terms make of the chunk, computed by the first that asks.

        Args:
            key: Names it, with all that it depends on but the chunk.
            compute: Computes it, without a gradient.
        """
        if key not in self._computed:
            self._computed[key] = compute()
        result: _Result = self._computed[key]
        return result

    def teacher_entropy(self) -> Tensor:
        """The entropy of the teacher's distribution, ``(n,)``.

        Raises:
            ValueError: If the answer does not tell it.
        """
        if isinstance(self._answer, SampledRows):
            return self._answer.entropies
        return -expectation(self.teacher(), self.teacher())

    def on(self, student_logits: Tensor) -> "LogitsChunk":
        """Return the chunk with other logits of the student."""
        return LogitsChunk(self.rows, student_logits, self._teacher)

    @property
    def _distribution(self) -> DistributionRows:
        if not isinstance(self._answer, DistributionRows):
            raise ValueError(
                "this term needs the teacher's log-probability of every token, and the teacher does "
                "not answer full_distribution; say so in the needs of the method"
            )
        return self._answer

    @property
    def _answer(self) -> TeacherRows:
        if self._teacher is None:
            raise ValueError(
                "a term reads the teacher without asking for it: set needs_teacher = True in its class"
            )
        return self._teacher

    def without_gradient_where(self, weight: Tensor) -> "LogitsChunk":
        """Return the chunk without gradient at rows of weight 0.

        Not even that of an infinite value, which times 0 would be NaN.
        """
        muted = weight == 0
        looks = not torch.compiler.is_compiling() and not is_queued(muted.device)
        if looks and not muted.any():
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
    """Whether :meth:`values` reads the teacher; where no term does, the teacher is not evaluated."""

    @property
    def may_overwrite_logits(self) -> bool:
        """Whether :meth:`values_and_gradient` may leave the gradient in the place of the logits."""
        return False

    @abstractmethod
    def values(self, chunk: LogitsChunk) -> Tensor:
        """The formula, differentiable in the student's logits: ``(n,)``."""

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """Values and their gradient in the student's logits: ``(n,), (n, V)``."""
        values, gradient = value_and_gradient(
            lambda logits: values_of(self, chunk.on(logits)), chunk.student_logits
        )
        if gradient is None:
            raise ValueError(
                f"the values of {type(self).__name__} have no gradient: compute them from the "
                "student's logits in the chunk. If they need none, give their LossTerm the coefficient "
                "0, or call logits_backend.per_token for them under torch.no_grad()"
            )
        return values, gradient


def values_of(term: TokenTerm, chunk: LogitsChunk) -> Tensor:
    """Return a term's values in a chunk.

    Raises:
        ValueError: If they are not one floating-point number for each position.
    """
    return checked(term, term.values(chunk), chunk)


def checked(term: TokenTerm, values: object, chunk: LogitsChunk) -> Tensor:
    """Return values that a term has computed, if there is one number for each position.

    Raises:
        ValueError: If there is not.
    """
    count = len(chunk.student_logits)
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{type(term).__name__}.values has returned {type(values).__name__} for {count} positions; "
            "return a tensor with one number for each"
        )
    if values.shape != (count,) or not values.is_floating_point():
        raise ValueError(
            f"{type(term).__name__}.values has returned shape {tuple(values.shape)} and type "
            f"{values.dtype} for {count} positions; return one floating-point number for each position"
        )
    return values
