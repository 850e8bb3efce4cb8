"""A teacher's answer in a chunk: log-probabilities of tokens, or of groups of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Combine = Callable[[Sequence[Tensor], float], Tensor]
"""The logits of a teacher's models and a temperature -> its log-probabilities."""


def single_model_log_probs(logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """The log-softmax of the only logits there are."""
    (only,) = logits
    return (only if temperature == 1 else only / temperature).log_softmax(-1)


class TeacherRows(ABC):
    """A teacher's distribution over events at the rows of a chunk.

    The events are a partition of the vocabulary, in an order that student and teacher share.
    """

    @abstractmethod
    def log_probs(self, temperature: float) -> Tensor:
        """The teacher's log-probability of each event, ``(n, E)``, without a gradient."""

    @abstractmethod
    def events_of(self, log_probs: Tensor) -> Tensor:
        """The student's log-probabilities of tokens as those of events: ``(n, V) -> (n, E)``."""

    @abstractmethod
    def to_logits(self, gradient: Tensor, log_probs: Tensor, events: Tensor) -> Tensor:
        """Take a gradient in the logits of events to those of tokens.

        Args:
            gradient: In logits whose softmax is the student's distribution over events, ``(n, E)``.
            log_probs: The student's, ``(n, V)``.
            events: What :meth:`events_of` makes of them.

        Returns:
            ``(n, V)``.
        """

    @abstractmethod
    def top_tokens(self) -> Tensor:
        """The teacher's most likely token at each row, ``(n,)``."""


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
        """The combined log-probabilities, computed once for each temperature."""
        if temperature not in self._log_probs:
            with torch.no_grad():
                self._log_probs[temperature] = self._combine(self._logits, temperature)
        return self._log_probs[temperature]

    def events_of(self, log_probs: Tensor) -> Tensor:
        """Return them as they are."""
        return log_probs

    def to_logits(self, gradient: Tensor, log_probs: Tensor, events: Tensor) -> Tensor:
        """Return it as it is."""
        return gradient

    def top_tokens(self) -> Tensor:
        """The most likely token."""
        return self.log_probs(1.0).argmax(-1)


class TopKRows(TeacherRows):
    r"""The teacher's k tokens are events, and all others together are one more.

    With :math:`S` the k tokens, the student's logits of the events may be taken to be :math:`z_v` for
    :math:`v \in S` and :math:`\log \sum_{v \notin S} e^{z_v}` for the rest, so that a gradient
    :math:`g` in them is :math:`g_v` at a token of :math:`S` and
    :math:`g_{rest}\, q_v / \sum_{u \notin S} q_u` at any other.

    Args:
        token_ids: ``(n, k)``, different in each row.
        log_probs: Of the events, ``(n, k + 1)``, or ``(n, k)`` where k is the whole vocabulary.
    """

    def __init__(self, token_ids: Tensor, log_probs: Tensor) -> None:
        self._ids, self._log_probs = token_ids, log_probs
        self._has_rest = log_probs.shape[1] > token_ids.shape[1]

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """The log-probabilities of the events.

        Raises:
            ValueError: If the temperature is not 1.
        """
        if temperature != 1:
            raise ValueError(
                f"the teacher's temperature is {temperature}, but it answers k tokens and a tail, "
                "which cannot be tempered without the tail's own tokens; use 1"
            )
        return self._log_probs

    def events_of(self, log_probs: Tensor) -> Tensor:
        """The student's log-probabilities of the k tokens and, by logsumexp, of the rest."""
        known = log_probs.gather(-1, self._ids)
        if not self._has_rest:
            return known
        rest = log_probs.scatter(-1, self._ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([known, rest], -1)

    def to_logits(self, gradient: Tensor, log_probs: Tensor, events: Tensor) -> Tensor:
        """Share the gradient of the rest among its tokens, by their probabilities."""
        k = self._ids.shape[1]
        if not self._has_rest:
            return torch.zeros_like(log_probs).scatter_(-1, self._ids, gradient)
        # Of a rest that has no probability at all, no token has a share.
        total = events[:, k:].clamp_min(torch.finfo(log_probs.dtype).min)
        shares = (log_probs - total).exp_().mul_(gradient[:, k:])
        return shares.scatter_(-1, self._ids, gradient[:, :k])

    def top_tokens(self) -> Tensor:
        """The most likely of the k tokens."""
        k = self._ids.shape[1]
        best = self._log_probs[:, :k].argmax(-1, keepdim=True)
        return self._ids.gather(-1, best)[:, 0]
