"""A teacher's answer in a chunk that names some tokens at each row."""

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor

from lightning_kd.divergences import Divergence, ForwardKL
from lightning_kd.fused.student_rows import StudentRows
from lightning_kd.fused.teacher_rows import TeacherRows

_FORWARD_KL_ALONE = (
    "tokens drawn from its distribution, from which the forward KL can be estimated and no other "
    "divergence, not even one that derives from it. Take forward_kl, or a teacher that answers "
    "full_distribution or top_k"
)


class TopKRows(TeacherRows):
    r"""The teacher's k tokens are events, and all others together are one more.

    With :math:`S` the k tokens, the student's logits of the events may be taken to be :math:`z_v` for
    :math:`v \in S` and :math:`\log \sum_{v \notin S} e^{z_v}` for the rest, so that a gradient
    :math:`g` in them is :math:`g_v` at a token of :math:`S` and
    :math:`g_{rest}\, q_v / \sum_{u \notin S} q_u` at any other.

    The rest is summed by itself: what the k tokens leave of 1 would be all round-off where it is
    small.

    Args:
        token_ids: ``(n, k)``, different in each row.
        log_probs: Of these tokens at temperature 1, ``(n, k)``.
        tails: Log-probability of all others together, ``(n,)``, at each temperature at which it is
            known; None where k is the whole vocabulary.
    """

    def __init__(
        self, token_ids: Tensor, log_probs: Tensor, tails: Mapping[float, Tensor] | None
    ) -> None:
        self._ids, self._known, self._tails = token_ids, log_probs, tails
        self._log_probs: dict[float, Tensor] = {}

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """The log-probabilities of the events, ``(n, k + 1)``; ``(n, k)`` without a tail.

        Raises:
            ValueError: If the tail is not known at the temperature.
        """
        if temperature not in self._log_probs:
            self._log_probs[temperature] = self._tempered(temperature)
        return self._log_probs[temperature]

    def _tempered(self, temperature: float) -> Tensor:
        events = self._known.double().div(temperature).log_softmax(-1)
        if self._tails is not None:
            if temperature not in self._tails:
                raise ValueError(
                    f"the teacher's temperature is {temperature}, but it answers k tokens and a "
                    "tail, which cannot be tempered without the tail's own tokens; use one at which "
                    f"it tells the tail: {', '.join(map(str, sorted(self._tails)))}"
                )
            # All is finite, also where a side has nothing. What half precision cannot hold as a
            # probability it can as a logarithm.
            limits = torch.finfo(torch.promote_types(self._known.dtype, torch.float32))
            tail = self._tails[temperature].double()[:, None].clamp_min(log(limits.tiny))
            left = (-tail.expm1()).clamp_min(limits.eps).log()
            if temperature == 1:
                # What a tail of nearly all leaves of 1 is round-off; the tokens themselves tell it.
                named = self._known.double().logsumexp(-1, keepdim=True)
                left = torch.where(tail < -log(2), left, named)
            events = torch.cat([events + left, tail], -1).log_softmax(-1)
        return events if self._known.dtype == torch.float64 else events.float()

    def events(
        self, student: StudentRows, student_temperature: float, teacher_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the k tokens and of the rest."""

        def compute() -> Tensor:
            known = student.logits.gather(-1, self._ids) / student_temperature
            rest = None
            if self._tails is not None:
                rest = student.log_normalizers(student_temperature, left_out=self._ids)
            return _event_log_probs(known, rest)

        own = student.events(student_temperature, compute)
        return own, self.log_probs(teacher_temperature).to(own.dtype)

    def divergence_and_gradient(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence and its gradient, shared by the tokens of the rest."""
        k = self._ids.shape[1]
        known = student.logits.gather(-1, self._ids) / student_temperature
        shares, sums, rest = student.exponentials(student_temperature, left_out=self._ids)
        own = _event_log_probs(known, None if self._tails is None else rest)
        theirs = self.log_probs(teacher_temperature).to(own.dtype)
        values, gradient = divergence.value_and_logit_gradient(own, theirs)
        gradient = gradient / student_temperature
        if self._tails is not None:
            # Of a rest that has no probability at all, no token has a share.
            shares.mul_(gradient[:, k:] / sums.clamp_min(torch.finfo(sums.dtype).tiny))
        return values, shares.scatter_(-1, self._ids, gradient[:, :k])

    def top_tokens(self) -> Tensor:
        """The most likely of the k tokens."""
        best = self._known.argmax(-1, keepdim=True)
        return self._ids.gather(-1, best)[:, 0]

    def most_likely(self, k: int) -> tuple[Tensor, Tensor]:
        """The most likely of the named tokens, and their log-probabilities.

        Raises:
            ValueError: If fewer tokens are named than k.
        """
        named = self._ids.shape[1]
        if k > named:
            raise ValueError(f"k is {k}; the teacher names {named} tokens at each position")
        best = self.log_probs(1.0)[:, :named].topk(k, -1)
        return self._ids.gather(-1, best.indices).long(), best.values


class SampledRows(TeacherRows):
    """Tokens drawn from the teacher's distribution, for the forward KL alone.

    Args:
        token_ids: ``(n, m)``.
        weights: ``(n, m)``.
        entropies: Of the whole distribution, ``(n,)``.
    """

    def __init__(self, token_ids: Tensor, weights: Tensor, entropies: Tensor) -> None:
        self._ids, self._weights, self.entropies = token_ids, weights, entropies

    entropies: Tensor
    """Of the teacher's distribution, ``(n,)``."""

    def events(
        self, student: StudentRows, student_temperature: float, teacher_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Refuse: tokens drawn at random are no distribution."""
        raise ValueError(
            f"a term compares distributions, but the teacher answers sampled: {_FORWARD_KL_ALONE}"
        )

    def divergence(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> Tensor:
        """Return the estimate of the forward KL.

        Raises:
            ValueError: If the divergence is another one, or the temperature is not 1.
        """
        self._check(divergence, teacher_temperature)
        normalizers = student.log_normalizers(student_temperature)
        logits = student.logits.gather(-1, self._ids) / student_temperature
        return self._estimate(logits - normalizers)

    def _estimate(self, log_probs: Tensor) -> Tensor:
        weights = self._weights.to(log_probs.dtype)
        # Masked before the product: 0 times an infinite value is NaN.
        products = weights * log_probs.masked_fill(weights == 0, 0.0)
        return -products.sum(-1) - self.entropies.to(log_probs.dtype)

    def divergence_and_gradient(
        self,
        divergence: Divergence,
        student: StudentRows,
        student_temperature: float,
        teacher_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the estimate of the forward KL and its gradient."""
        self._check(divergence, teacher_temperature)
        logits = student.logits.gather(-1, self._ids) / student_temperature
        gradient, sums, normalizers = student.exponentials(student_temperature)
        weights = self._weights.to(logits.dtype) / student_temperature
        gradient.mul_(weights.sum(-1, keepdim=True) / sums).scatter_add_(-1, self._ids, -weights)
        return self._estimate(logits - normalizers), gradient

    def top_tokens(self) -> Tensor:
        """Refuse: the most likely token may not be among the drawn ones.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "the teacher answers tokens drawn from its distribution (sampled), which do not tell the "
            "most likely one"
        )

    def _check(self, divergence: Divergence, teacher_temperature: float) -> None:
        check_estimable("the divergence", divergence, "the teacher")
        if teacher_temperature != 1:
            raise ValueError(
                f"the teacher's temperature is {teacher_temperature}, but its tokens are drawn at "
                "temperature 1; use 1"
            )


def check_estimable(option: str, divergence: Divergence, teacher: str) -> None:
    """Refuse a divergence that cannot be estimated from drawn tokens.

    Args:
        option: What it was given as.
        divergence: The divergence.
        teacher: Name of what answers drawn tokens.

    Raises:
        ValueError: If it is any other than :class:`~lightning_kd.divergences.ForwardKL`, a class that
            derives from it included: its own formula would not be read.
    """
    if type(divergence) is not ForwardKL:
        raise ValueError(
            f"{option} is {divergence!r}, but {teacher} answers sampled: {_FORWARD_KL_ALONE}"
        )


def _event_log_probs(known: Tensor, rest: Tensor | None) -> Tensor:
    """Normalize logits of events: of the named tokens, ``(n, k)``, and of the rest, ``(n, 1)``."""
    return (known if rest is None else torch.cat([known, rest], -1)).log_softmax(-1)
