"""Several teachers, each for its own rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from lightning_kd.batch import FILLER_ROW, Batch
from lightning_kd.devices import to_device
from lightning_kd.fused import (
    ALIGNED_KINDS,
    AnswerKind,
    DistributionRows,
    FullDistribution,
    RoutedLogits,
    SampledTokens,
    TeacherAnswer,
    TopK,
    single_model_log_probs,
)
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.resuming import Plain
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import CompositeTeacher, same_width
from lightning_kd.teachers.contract import Ability, Teacher, checked_answer
from lightning_kd.teachers.given import TeacherLike, as_teacher


@runtime_checkable
class HasColumns(Protocol):
    """Data whose rows have further columns."""

    def column(self, name: str) -> Iterable[tuple[str, object]]:
        """Yield the values of a column, each with its place in the files."""


class RoutedTeacher(CompositeTeacher):
    """Several teachers; a column of the data selects one of them for each row.

    It answers what all members can, at the temperatures that all of them declare. Members that answer
    ``top_k`` or ``sampled`` need to name equally many tokens.

    Args:
        members: A teacher for each value of the column.
        column: A column of the data module's ``extra_columns``.

    Raises:
        ValueError: If there are no members, one is sharded, or they have no answer in common; in a
            run, if a row names none of them.

    References:
        Lu and Thinking Machines Lab, *On-Policy Distillation*, 2025 (several teachers, one for each
        data set). https://thinkingmachines.ai/blog/on-policy-distillation/
    """

    answers: frozenset[Ability] = frozenset(get_args(AnswerKind)) - ALIGNED_KINDS

    def __init__(self, members: dict[str, TeacherLike], *, column: str = "teacher") -> None:
        if not isinstance(members, Mapping) or not all(isinstance(name, str) for name in members):
            raise ValueError(
                f"members is {members!r:.80}; give a mapping from each value of the column, as text, "
                "to its teacher"
            )
        self.members = {
            name: as_teacher(member, f"member {name!r} of RoutedTeacher")
            for name, member in members.items()
        }
        self.column = column
        self.check_members()
        self.answers = self.shared_answers & RoutedTeacher.answers
        self.temperatures = self.shared_temperatures
        if not self.answers:
            raise ValueError(
                f"the members of a routed teacher need an answer in common; {self.described_answers}"
            )
        if self.answers_collectively:
            raise ValueError(
                "placement: sharded needs all processes for every member, but each process asks the "
                "teachers of its own rows; use replicated or offloaded"
            )

    @property
    def named_members(self) -> Mapping[str, Teacher]:
        """The members, each with its value of the column."""
        return {repr(name): member for name, member in self.members.items()}

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """The one that selects, and those that members read."""
        return super().columns | {self.column}

    def check_data(self, data: object) -> None:
        """Refuse rows that name none of the members, where the data module tells its columns.

        Raises:
            ValueError: If there is one, or no such column.
        """
        super().check_data(data)
        if isinstance(data, HasColumns):
            for where, name in data.column(self.column):
                if name not in self.members:
                    raise ValueError(
                        f"{where}: column {self.column!r} asks for the teacher {name!r}; there are "
                        f"{', '.join(self.members)}"
                    )

    def check_texts(
        self, texts: Iterable[tuple[Batch, ScoredPositions]], encoding: Plain = None
    ) -> None:
        """Let each member look at its own texts."""
        for batch, positions in texts:
            routes = self._routes(batch)
            for number, member in enumerate(self.members.values()):
                chosen = routes == number
                if member.looks_at_texts and chosen.any():
                    own = (rows_of(batch, chosen), _of_rows(positions, chosen))
                    member.check_texts([own], encoding)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "full_distribution",
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Let each member answer for its own rows, and put the answers in order."""
        members = list(self.members.values())
        present, routes = torch.unique(self._routes(batch), return_inverse=True)
        answers = []
        for number, member in enumerate(present.tolist()):
            chosen = routes == number
            own = _of_rows(positions, chosen)
            answers.append(
                checked_answer(
                    members[member],
                    rows_of(batch, chosen),
                    own,
                    kind=kind,
                    logits_backend=logits_backend,
                )
            )
        routes = routes[positions.rows]
        if kind == "full_distribution":
            return self._distribution(
                [a for a in answers if isinstance(a, FullDistribution)], routes
            )
        self.check_vocabularies(f"the answer {kind}")
        named = {_named_tokens(answer) for answer in answers}
        if len(named) > 1:
            raise ValueError(
                f"the members of the routed teacher answer k = {', '.join(map(str, sorted(named)))} "
                "tokens; rows of one batch need one k"
            )
        # Each with its own tail, which depends on the type of its numbers.
        tails = [a.with_tail(self.vocabulary_size) if isinstance(a, TopK) else a for a in answers]
        return _merged(tails, routes)

    def _distribution(
        self, answers: Sequence[FullDistribution], routes: Tensor
    ) -> FullDistribution:
        members = same_width(answers)
        most = max(len(answer.logits) for answer in members)
        # A member with fewer models than another has its last logits again, which it does not read.
        logits = tuple(
            RoutedLogits(
                tuple(answer.logits[min(number, len(answer.logits) - 1)] for answer in members),
                routes,
            )
            for number in range(most)
        )
        if all(
            type(a) is FullDistribution and a.combine is single_model_log_probs for a in members
        ):
            return FullDistribution(logits)
        return RoutedDistribution(logits, members=members, routes=routes)

    def routes(self, batch: Batch) -> tuple[Sequence[str], Tensor]:
        """Return the values of the column that select the teachers, and the number of each row's."""
        return list(self.members), self._routes(batch)

    def _routes(self, batch: Batch) -> Tensor:
        """The number of each row's teacher, ``(B,)``."""
        names = batch.get("extra", {}).get(self.column)
        if names is None:
            raise ValueError(
                f"the rows have no column {self.column!r} that says which teacher is theirs; name "
                f"it in data.extra_columns (there are {sorted(batch.get('extra', {}))})"
            )
        numbers = {name: number for number, name in enumerate(self.members)}
        for name, row in zip(names, batch["row"].tolist(), strict=True):
            if name not in numbers and row != FILLER_ROW:
                raise ValueError(
                    f"row {row} asks for the teacher {name!r}; there are {', '.join(numbers)}"
                )
        routes = [numbers.get(name, 0) for name in names]
        return to_device(torch.tensor(routes), batch["input_ids"].device)


@dataclass(frozen=True)
class RoutedDistribution(FullDistribution):
    """Full distributions of which some combine several models, each for its own positions."""

    members: tuple[FullDistribution, ...] = field(kw_only=True)
    """The members' answers: number of logits, and their combination."""
    routes: Tensor = field(kw_only=True)
    """The number of each position's member, ``(N,)``."""

    @property
    def shares(self) -> tuple[float | Tensor, ...]:
        """Those of each position's member, ``(N,)``."""
        shares = torch.zeros(len(self.logits), len(self.routes), device=self.routes.device)
        for number, member in enumerate(self.members):
            for share, own in zip(shares, member.shares, strict=False):
                share[self.routes == number] = own
        return tuple(shares)

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> DistributionRows:
        """Return the distribution of each position's member."""
        routes, before = self.routes[rows], self.routes[: rows.start]
        parts = []
        for number, member in enumerate(self.members):
            own = routes == number
            # A member has its own positions only, in order.
            start = int((before == number).sum())
            there = slice(start, start + int(own.sum()))
            given = [tensor[own] for tensor in logits[: len(member.logits)]]
            parts.append((own, member.rows(there, given, width)))

        def select(given: Sequence[Tensor], temperature: float) -> Tensor:
            log_probs = torch.empty_like(given[0])
            for own, part in parts:
                log_probs[own] = part.log_probs(temperature).to(log_probs.dtype)
            return log_probs

        return DistributionRows(logits, select)


def _of_rows(positions: ScoredPositions, chosen: Tensor) -> ScoredPositions:
    return ScoredPositions(positions.mask[chosen], positions.targets[chosen[positions.rows]])


def rows_of(batch: Batch, chosen: Tensor) -> Batch:
    """Return some rows of a batch, with everything that belongs to them.

    Args:
        batch: The batch; its second stream, if any, stays behind.
        chosen: True at the rows, ``(B,)``.
    """
    kept = chosen.tolist()

    def select(value: Tensor | list[object] | Mapping[str, list[object]]) -> object:
        if isinstance(value, Tensor):
            return value[chosen]
        if isinstance(value, Mapping):
            return {name: select(column) for name, column in value.items()}
        return [item for item, keep in zip(value, kept, strict=True) if keep]

    parts = {name: value for name, value in batch.items() if name != "text"}
    return cast(Batch, {name: select(value) for name, value in parts.items()})  # type: ignore[arg-type]


def _named_tokens(answer: TeacherAnswer) -> int:
    """The tokens that an answer names at a position."""
    return answer.token_ids.shape[1] if isinstance(answer, TopK | SampledTokens) else 1


def _merged(answers: Sequence[Any], routes: Tensor) -> TeacherAnswer:
    """Put answers about each member's positions where these are among all positions."""
    columns: dict[str, Any] = {}
    for column in fields(answers[0]):
        parts = [getattr(answer, column.name) for answer in answers]
        if isinstance(parts[0], Tensor):
            columns[column.name] = _in_order(parts, routes)
        else:  # the tails, by temperature
            shared = set.intersection(*(set(part) for part in parts))
            columns[column.name] = {t: _in_order([p[t] for p in parts], routes) for t in shared}
    merged: TeacherAnswer = type(answers[0])(**columns)
    return merged


def _in_order(parts: Sequence[Tensor], routes: Tensor) -> Tensor:
    """Put values of each member's positions where these are among all positions."""
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    merged = parts[0].new_empty(len(routes), *parts[0].shape[1:], dtype=dtype)
    for number, part in enumerate(parts):
        merged[routes == number] = part.to(dtype)
    return merged
