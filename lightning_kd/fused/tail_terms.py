"""Terms of a sampled token that the teacher's named tokens may leave out."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm
from lightning_kd.fused.token_terms import TokenLoss


class TailLoss(TokenTerm):
    r"""A function of a sampled token's log-probability, and of what the tail hides of its log-ratio.

    With student :math:`q`, teacher :math:`p` and the tail :math:`T`, the tokens that the teacher
    does not name, it is :math:`f(\log q(y_t), h_t)`, where

    .. math:: h_t = 1[y_t \in T]
        \left(\log \frac{q(y_t)}{p(y_t)} - \log \frac{q(T)}{p(T)}\right)

    has no gradient. Over :math:`y_t \sim q` the mean of :math:`h_t` is the reverse KL of all tokens
    minus that of the named ones and the tail, and the mean of
    :math:`h_t \nabla \log q(y_t)` the difference of their gradients.

    Args:
        tokens: ``(N,)``; where there is ``IGNORE_INDEX``, the value is 0.
        in_tail: Whether the teacher leaves the token to the tail, ``(N,)``.
        teacher_log_probs: Of the tokens, at the teacher's temperature, ``(N,)``.
        function: :math:`f`, elementwise; it also gets the positions as a slice, to look up what else
            it needs there.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's.

    Example:
        >>> from lightning_kd.fused import LogitsChunk, TopK
        >>> teacher = TopK(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
        >>> chunk = LogitsChunk(slice(0, 1), torch.zeros(1, 4), teacher.rows(slice(0, 1), (), 4))
        >>> likely = torch.tensor([0.4]).log()  # of the tail's 0.5
        >>> tail = TailLoss(torch.tensor([2]), torch.tensor([True]), likely, lambda q, h, rows: h)
        >>> tail.values(chunk)  # log(0.25 / 0.4) - log(0.75 / 0.5)
        tensor([-0.8755])
    """

    needs_teacher = True

    def __init__(
        self,
        tokens: Tensor,
        in_tail: Tensor,
        teacher_log_probs: Tensor,
        function: Callable[[Tensor, Tensor, slice], Tensor],
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        self.tokens, self.in_tail, self.teacher_log_probs = tokens, in_tail, teacher_log_probs
        self.function = function
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The function."""
        return self._given_the_tail(chunk).values(chunk)

    def values_and_gradient(self, chunk: LogitsChunk) -> tuple[Tensor, Tensor]:
        """The function, and its slope times that of the log-probability."""
        return self._given_the_tail(chunk).values_and_gradient(chunk)

    def _given_the_tail(self, chunk: LogitsChunk) -> TokenLoss:
        hidden = self._hidden(chunk)

        def loss(log_probs: Tensor, rows: slice) -> Tensor:
            return self.function(log_probs, hidden, rows)

        return TokenLoss(self.tokens, loss, temperature=self.student_temperature)

    def _hidden(self, chunk: LogitsChunk) -> Tensor:
        # Detached, and not without gradients: the chunk keeps what it computes for other terms.
        rows, student = chunk.rows, chunk.student(self.student_temperature).detach()
        events, of_teacher = chunk.events(self.student_temperature, self.teacher_temperature)
        own = student.gather(-1, _index(self.tokens[rows]))[:, 0]
        of_token = own - self.teacher_log_probs[rows].to(own.dtype)
        # The last event is the tail; where there is none, no token is in it.
        of_tail = events[:, -1].detach() - of_teacher[:, -1]
        return torch.where(self.in_tail[rows], of_token - of_tail, 0.0)


class SquaredScore(TokenTerm):
    r"""Squared norm of a multiple of a token's score, :math:`\|w_t\,\nabla_z \log q^\tau(y_t)\|^2`.

    In the student's logits :math:`z` it is
    :math:`w_t^2\,(1 - 2 q^\tau(y_t) + \sum_v q^\tau(v)^2) / \tau^2`: the chance part of a policy
    gradient at a token.

    Args:
        tokens: ``(N,)``.
        factor: :math:`w_t`; 0 where there is no token.
        temperature: Divides the student's logits.

    Example:
        >>> from lightning_kd.fused import CrossEntropy, LogitsChunk
        >>> chunk, tokens = LogitsChunk(slice(0, 1), torch.zeros(1, 4)), torch.tensor([2])
        >>> SquaredScore(tokens, CrossEntropy(tokens)).values(chunk)  # log(4)**2 * 0.75
        tensor([1.4414])
    """

    def __init__(self, tokens: Tensor, factor: TokenTerm, *, temperature: float = 1.0) -> None:
        self.tokens, self.factor, self.temperature = tokens, factor, temperature
        self.needs_teacher = factor.needs_teacher

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The square."""
        probs = chunk.student(self.temperature).exp()
        own = probs.gather(-1, _index(self.tokens[chunk.rows]))[:, 0]
        norms = (1 - 2 * own + probs.square().sum(-1)) / self.temperature**2
        return self.factor.values(chunk).square() * norms


def _index(tokens: Tensor) -> Tensor:
    return tokens.masked_fill(tokens == IGNORE_INDEX, 0)[:, None]
