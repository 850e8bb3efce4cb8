"""Token terms: what losses and metrics compute at each position."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.divergences.log_space import expectation, value_and_gradient, weighted
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm


class DivergenceTerm(TokenTerm):
    r"""A divergence from the teacher, :math:`D(p^{\tau_t}, q^{\tau_s})`.

    There is no factor :math:`\tau^2`. Where the teacher names k tokens and a tail, it is the
    divergence of the distributions over these k + 1 events: a lower bound of every f-divergence over
    all tokens, which it equals where k is all of them or all but one. From tokens drawn at random it
    is an unbiased estimate of the forward KL, the only one they tell.

    Args:
        divergence: Any divergence, or its registered name.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's.

    Raises:
        ValueError: If it is neither.
    """

    needs_teacher = True

    def __init__(
        self,
        divergence: Divergence | str,
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        self.divergence = make_divergence(divergence)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    @property
    def may_overwrite_logits(self) -> bool:
        """Whether a subclass leaves the gradient to this class, and reads no logits after it."""
        return type(self).values_and_gradient is DivergenceTerm.values_and_gradient

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The divergence."""
        return chunk.divergence(self.divergence, self.student_temperature, self.teacher_temperature)

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """The divergence and its closed form, where it has one."""
        return chunk.divergence_and_gradient(
            self.divergence, self.student_temperature, self.teacher_temperature
        )


class TokenLoss(TokenTerm):
    r"""A function of the log-probability of one token at each position.

    Args:
        tokens: ``(N,)``; where there is ``IGNORE_INDEX``, the value is 0.
        function: :math:`f(\log q^\tau(y_t))`, elementwise; it also gets the positions as a slice, to
            look up what else it needs there.
        temperature: Divides the student's logits.
    """

    def __init__(
        self,
        tokens: Tensor,
        function: Callable[[Tensor, slice], Tensor],
        *,
        temperature: float = 1.0,
    ) -> None:
        self.tokens, self.function, self.temperature = tokens, function, temperature

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The function."""
        tokens, known = _tokens_in(self.tokens, chunk.rows)
        chosen = chunk.student(self.temperature).gather(-1, tokens)[:, 0]
        return self.function(chosen, chunk.rows).masked_fill(~known, 0.0)

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """The function, and its slope times that of the log-probability."""
        tokens, known = _tokens_in(self.tokens, chunk.rows)
        log_probs = chunk.student(self.temperature)
        values, slope = value_and_gradient(
            lambda chosen: self.function(chosen, chunk.rows).masked_fill(~known, 0.0),
            log_probs.gather(-1, tokens)[:, 0],
        )
        if slope is None:
            raise ValueError(
                f"the function of {type(self).__name__} does not depend on the log-probabilities, so "
                "it has no gradient: compute it from them. If it needs none, give its LossTerm the "
                "coefficient 0, or call logits_backend.per_token for it under torch.no_grad()"
            )
        slope = (slope / self.temperature)[:, None]
        gradient = log_probs.exp().mul_(-slope)
        return values, gradient.scatter_add_(-1, tokens, slope)


class CrossEntropy(TokenLoss):
    r"""Negative log-likelihood, :math:`-\log q(y_t)`; 0 where there is no label.

    Example:
        >>> block = LogitsChunk(slice(0, 1), torch.zeros(1, 4))
        >>> CrossEntropy(torch.tensor([2])).values(block)
        tensor([1.3863])
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__(labels, lambda log_probs, rows: -log_probs)


class LogRatio(TokenLoss):
    r"""The log-ratio of student and teacher at one token, :math:`\log q^\tau(y_t) - \log p(y_t)`.

    Args:
        tokens: ``(N,)``; where there is ``IGNORE_INDEX``, the value is 0.
        teacher_log_probs: Of these tokens, ``(N,)``.
        temperature: Divides the student's logits.
    """

    def __init__(
        self, tokens: Tensor, teacher_log_probs: Tensor, *, temperature: float = 1.0
    ) -> None:
        def ratio(log_probs: Tensor, rows: slice) -> Tensor:
            return log_probs - teacher_log_probs[rows].to(log_probs.dtype)

        super().__init__(tokens, ratio, temperature=temperature)


class TeacherCrossEntropy(TokenTerm):
    r"""Cross-entropy with the teacher's distribution, :math:`-\sum_v p(v) \log q(v)`."""

    needs_teacher = True

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the vocabulary."""
        return -expectation(chunk.teacher(), chunk.student())

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """The sum, and ``q - p``."""
        return self.values(chunk), chunk.student().exp() - chunk.teacher().exp()


class WeightedSum(TokenTerm):
    """A sum of quantities, each times a constant or a constant of each position.

    Args:
        parts: Quantities and their factors, a number or ``(N,)``.
    """

    def __init__(self, *parts: tuple[TokenTerm, float | Tensor]) -> None:
        self.parts = parts
        self.needs_teacher = any(token_term.needs_teacher for token_term, _ in parts)

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum."""
        products = []
        for token_term, factor in self.parts:
            own = _at(factor, chunk.rows)
            here = chunk.without_gradient_where(own) if isinstance(own, Tensor) else chunk
            products.append(weighted(own, token_term.values(here)))
        return torch.stack(products).sum(0)

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """The sums of both."""
        total = torch.zeros_like(chunk.student_logits[:, 0])
        slope = torch.zeros_like(chunk.student_logits)
        for token_term, factor in self.parts:
            values, gradient = token_term.values_and_gradient(chunk)
            own = _at(factor, chunk.rows)
            total += weighted(own, values)
            slope += weighted(own[:, None] if isinstance(own, Tensor) else own, gradient)
        return total, slope


class ZeroTerm(TokenTerm):
    """0 everywhere: a term that a micro-batch has no data for."""

    def values(self, chunk: LogitsChunk) -> Tensor:
        """Zeros, also where logits are infinite."""
        return chunk.student_logits[:, :0].sum(-1)


class Entropy(TokenTerm):
    """Entropy of the student's distribution, in nats."""

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the vocabulary."""
        return -expectation(chunk.student(), chunk.student())


class TeacherEntropy(TokenTerm):
    """Entropy of the teacher's distribution, in nats."""

    needs_teacher = True

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the vocabulary, or what the answer says it is."""
        return chunk.teacher_entropy()


class TeacherTokenLogProb(TokenTerm):
    """The teacher's log-probability of one token at each position.

    Args:
        tokens: ``(N,)``; where there is ``IGNORE_INDEX``, the value is 0.
        temperature: Divides the teacher's logits.
    """

    needs_teacher = True

    def __init__(self, tokens: Tensor, *, temperature: float = 1.0) -> None:
        self.tokens, self.temperature = tokens, temperature

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The log-probability."""
        tokens, known = _tokens_in(self.tokens, chunk.rows)
        chosen = chunk.teacher(self.temperature).gather(-1, tokens)[:, 0]
        return chosen.masked_fill(~known, 0.0)


class LogNormalizer(TokenTerm):
    r"""The logarithm of the student's softmax denominator, :math:`\log \sum_v e^{z_v}`."""

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the vocabulary."""
        return chunk.student_logits.logsumexp(-1)


class TeacherLogNormalizer(TokenTerm):
    """The same of one of the teacher's models.

    Args:
        source: The number of the model among the ``sources`` of the answer.
    """

    needs_teacher = True

    def __init__(self, source: int) -> None:
        self.source = source

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the vocabulary."""
        return chunk.teacher_log_normalizer(self.source)


class Top1Agreement(TokenTerm):
    """1 where student and teacher hold the same token for the most likely, else 0."""

    needs_teacher = True

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The comparison."""
        same = chunk.student().argmax(-1) == chunk.teacher_top_tokens()
        return same.to(chunk.student_logits.dtype)


def _tokens_in(tokens: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The tokens of some rows as an index, ``(n, 1)``, and which of them are tokens, ``(n,)``."""
    known = tokens[rows] != IGNORE_INDEX
    return tokens[rows].masked_fill(~known, 0)[:, None], known


def _at(factor: float | Tensor, rows: slice) -> float | Tensor:
    return factor[rows] if isinstance(factor, Tensor) else factor
