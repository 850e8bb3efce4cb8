"""Several teachers, averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite, log
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.fused import (
    AnswerKind,
    FullDistribution,
    TeacherAnswer,
    TokenLogProbs,
    single_model_log_probs,
)
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import CompositeTeacher
from lightning_kd.teachers.contract import Ability, Teacher, checked_answer
from lightning_kd.teachers.local import LocalTeacher

Averaging = Literal["logits", "probabilities", "log_probs"]


class TeacherEnsemble(CompositeTeacher):
    r"""Several teachers whose predictions are averaged with weights :math:`w_k`.

    ===============  ====================================================================
    ``combine``      teacher distribution at temperature :math:`\tau`
    ===============  ====================================================================
    `logits`         :math:`\mathrm{softmax}(\sum_k w_k u_k / \tau)` (BabyLlama)
    `probabilities`  :math:`\sum_k w_k\, \mathrm{softmax}(u_k / \tau)`
    `log_probs`      :math:`\propto \exp \sum_k w_k \log \mathrm{softmax}(u_k / \tau)`
    ===============  ====================================================================

    The first and the last are the same distribution: a log-softmax only shifts the logits, and a
    shift does not survive the softmax. Both names are in use. The three agree where all models do.

    All members answer ``full_distribution``; or all answer ``token_log_probs``, of which an average of
    ``probabilities`` is exact. A member that is an ensemble itself counts with its own distribution at
    :math:`\tau` for :math:`\mathrm{softmax}(u_k / \tau)`.

    Args:
        members: The teachers.
        combine: What is averaged.
        weights: One weight for each member, divided by their sum. Defaults to equal weights.

    Raises:
        ValueError: If there are no members, the weights do not fit them, or their answers cannot be
            averaged.

    References:
        Timiryasov and Tastet, *Baby Llama*, 2023, section 3. https://arxiv.org/abs/2308.02019
    """

    answers: frozenset[Ability] = frozenset({"full_distribution", "token_log_probs"})

    def __init__(
        self,
        members: list[LocalTeacher | Teacher],
        *,
        combine: Averaging = "logits",
        weights: list[float] | None = None,
    ) -> None:
        if combine not in get_args(Averaging):
            raise ValueError(f"unknown combine {combine!r}; choose one of {get_args(Averaging)}")
        self.members = members
        self.check_members()
        averaged: set[Ability] = {"full_distribution"}
        if combine == "probabilities":
            averaged.add("token_log_probs")
        self.answers = self.shared_answers & averaged
        if not self.answers:
            raise ValueError(
                f"combine: {combine} needs members that all answer {' or '.join(sorted(averaged))}; "
                f"{self.described_answers}. Token log-probabilities are averaged with combine: "
                "probabilities"
            )
        weights = [1.0] * len(members) if weights is None else weights
        if len(weights) != len(members):
            raise ValueError(
                f"{len(weights)} weights came for {len(members)} members; give one each"
            )
        if not all(isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
            raise ValueError(f"weights must be 0 or more and not all 0; got {weights}")
        self.combine: Averaging = combine
        self.weights = [w / sum(weights) for w in weights]

    @property
    def named_members(self) -> Mapping[str, Teacher]:
        """The members, each with its number."""
        return {str(number): member for number, member in enumerate(self.members)}

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Let every member answer, and average."""
        given = [
            checked_answer(member, batch, positions, kind=kind, logits_backend=logits_backend)
            for member in self.members
        ]
        weights = tuple(self.weights)
        if kind == "token_log_probs":
            self.check_vocabularies(kind)
            values = [answer.values for answer in given if isinstance(answer, TokenLogProbs)]
            weighted = [v + log(w) for v, w in zip(values, weights, strict=True) if w > 0]
            return TokenLogProbs(torch.stack(weighted).logsumexp(0))
        members = tuple(answer for answer in given if isinstance(answer, FullDistribution))
        logits = tuple(source for answer in members for source in answer.logits)
        return FullDistribution(logits, Average(members, weights, self.combine))


@dataclass(frozen=True)
class Average:
    """The weighted average of several distributions, as a function of all their logits.

    Example:
        >>> from lightning_kd.fused import MaterializedLogits
        >>> zeros = torch.zeros(1, 2)
        >>> member = FullDistribution((MaterializedLogits(zeros),))
        >>> average = Average((member, member), (0.5, 0.5), "logits")
        >>> average([zeros, torch.tensor([[0.0, 2.0]])], 1.0).exp()
        tensor([[0.2689, 0.7311]])
    """

    members: tuple[FullDistribution, ...]
    """The members' answers: number of logits, and their combination."""
    weights: tuple[float, ...]
    """They add up to 1."""
    combine: Averaging

    def __call__(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """Compute the log-probabilities at a temperature, ``(n, V)``."""
        own, start = [], 0
        for member, weight in zip(self.members, self.weights, strict=True):
            end = start + len(member.logits)
            if weight > 0:
                own.append((member, logits[start:end], weight))
            start = end
        if self.combine == "probabilities":
            shares = (m.combine(u, temperature) + log(w) for m, u, w in own)
            return reduce(torch.logaddexp, shares)
        (first, scale), *others = (_tempered(*parts, temperature) for parts in own)
        total = first * scale
        for tempered, scale in others:
            total.add_(tempered, alpha=scale)
        return total.log_softmax(-1)


def _tempered(
    member: FullDistribution, logits: Sequence[Tensor], weight: float, temperature: float
) -> tuple[Tensor, float]:
    """Return logits of a member and a factor: their product is its part in a geometric mean."""
    if member.combine is single_model_log_probs:
        (only,) = logits
        return only, weight / temperature
    return member.combine(logits, temperature), weight
