"""Several teachers, averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isfinite, log
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.fused import (
    AnswerKind,
    DistributionRows,
    FullDistribution,
    TeacherAnswer,
    TokenLogProbs,
)
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.option_checks import check_choice
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import CompositeTeacher, same_width, wide
from lightning_kd.teachers.contract import Ability, Teacher, checked_answer
from lightning_kd.teachers.given import TeacherLike, as_teacher

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
        members: list[TeacherLike],
        *,
        combine: Averaging = "logits",
        weights: list[float] | None = None,
    ) -> None:
        check_choice("combine", combine, get_args(Averaging))
        if not isinstance(members, list | tuple):
            raise ValueError(f"members is a {type(members).__name__}; give a list of teachers")
        self.members = [
            as_teacher(member, f"member {number} of TeacherEnsemble")
            for number, member in enumerate(members)
        ]
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

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that a resumed run must not change; weights as shares of 1."""
        return super().resume_settings() | {"weights": self.weights}

    @property
    def named_members(self) -> Mapping[str, Teacher]:
        """The members, each with its number."""
        return {str(number): member for number, member in enumerate(self.members)}

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(member.looks_ahead for member in self.members)

    def announce(self, batch: Batch, positions: ScoredPositions, *, kind: AnswerKind) -> None:
        """Tell every member."""
        for member in self.members:
            member.announce(batch, positions, kind=kind)

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
            self.check_vocabularies(f"the answer {kind}")
            values = [answer.values for answer in given if isinstance(answer, TokenLogProbs)]
            weighted = [wide(v) + log(w) for v, w in zip(values, weights, strict=True) if w > 0]
            return TokenLogProbs(torch.stack(weighted).logsumexp(0))
        members = same_width([answer for answer in given if isinstance(answer, FullDistribution)])
        logits = tuple(source for answer in members for source in answer.logits)
        return AveragedDistribution(
            logits, members=members, weights=weights, averaging=self.combine
        )


def teacher_of(given: object) -> Teacher:
    """Return the teacher of a module, given as such, as a model, or as a list that is averaged.

    A model may be given by name, by configuration or as an object.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> teacher_of(["./one", "./other"]).combine
        'logits'
    """
    return TeacherEnsemble(list(given)) if isinstance(given, list | tuple) else as_teacher(given)


@dataclass(frozen=True)
class AveragedDistribution(FullDistribution):
    """The weighted average of several distributions.

    Example:
        >>> from lightning_kd.fused import MaterializedLogits
        >>> one, other = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])
        >>> members = [FullDistribution((MaterializedLogits(logits),)) for logits in (one, other)]
        >>> average = AveragedDistribution(
        ...     (*members[0].logits, *members[1].logits),
        ...     members=tuple(members), weights=(0.5, 0.5), averaging="logits",
        ... )
        >>> average.rows(slice(0, 1), [one, other], 2).log_probs(1.0).exp()
        tensor([[0.2689, 0.7311]])
    """

    members: tuple[FullDistribution, ...] = field(kw_only=True)
    """The members' answers: number of logits, and their combination."""
    weights: tuple[float, ...] = field(kw_only=True)
    """They add up to 1."""
    averaging: Averaging = field(kw_only=True)

    @property
    def shares(self) -> tuple[float | Tensor, ...]:
        """The weight of each member, divided among its models."""
        both = zip(self.members, self.weights, strict=True)
        return tuple(weight * share for member, weight in both for share in member.shares)

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> DistributionRows:
        """Return the average at some positions."""
        own, start = [], 0
        for member, weight in zip(self.members, self.weights, strict=True):
            end = start + len(member.logits)
            if weight > 0:
                own.append((member.rows(rows, logits[start:end], width), weight))
            start = end

        def average(_: Sequence[Tensor], temperature: float) -> Tensor:
            if self.averaging == "probabilities":
                return reduce(torch.logaddexp, (m.log_probs(temperature) + log(w) for m, w in own))
            (first, scale), *others = (
                (tensor, factor * weight)
                for (tensor, factor), weight in ((m.unnormalized(temperature), w) for m, w in own)
            )
            total = first * scale
            for tensor, scale in others:
                total.add_(tensor, alpha=scale)
            return total.log_softmax(-1)

        return DistributionRows(logits, average)
