"""A loss as named terms per token, and the sums that one optimizer step adds up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused import LazyLogits, TeacherAnswer, TokenTerm
from lightning_kd.models import LogitsBackend
from lightning_kd.normalization import Normalization, divisor
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class Scores:
    """What student and teacher say at the scored positions of a micro-batch."""

    positions: ScoredPositions
    student: LazyLogits
    teacher: TeacherAnswer | None = None
    uncut: "Scores | None" = None
    """The same over all tokens, where both were cut to a shared vocabulary."""


@dataclass(frozen=True)
class LossTerm:
    """One named part of a loss: what it is at a position, and what it weighs.

    Raises:
        ValueError: If it is over other data than the batch's and has no normalization of its own.
    """

    token_term: TokenTerm
    """Nats at each scored position."""
    coefficient: float = 1.0
    """Weight of the term in the loss."""
    normalization: Normalization | None = None
    """Its own, where a method divides its terms differently; None for the module's."""
    count_ratio: Tensor | float = 1.0
    """For a normalization of its own: the count of the optimizer step under the module's
    normalization, over that under its own, ``()``. All gradients are divided by the former."""
    scores: Scores | None = None
    """For a term over other data than the batch's."""

    def __post_init__(self) -> None:
        """Check that the count of the step knows of the term's tokens."""
        if self.scores is not None and self.normalization is None:
            raise ValueError(
                "a term over other data than the batch's is not in the count of the step; give it "
                "a normalization of its own and the count_ratio"
            )


@dataclass(frozen=True)
class EvaluatedTerm:
    """A term as numbers, without a gradient."""

    values: Tensor
    """Nats at each scored position, ``(N,)``."""
    coefficient: float
    positions: ScoredPositions
    """The batch's, or those of other data."""
    row_weights: Tensor
    """What each token of a row weighs before coefficient and division, ``(B,)``."""
    count: Tensor
    """What the micro-batch adds to the divisor of the term, ``()``."""
    count_ratio: Tensor | float
    """The count of the step over the term's own; 1 for the module's normalization."""
    is_own: bool
    """Has the term a normalization of its own?"""

    @property
    def sum(self) -> Tensor:
        """The weighted sum of the values, ``()``, float64."""
        return weighted(self.row_weights[self.positions.rows], self.values).sum()


@dataclass(frozen=True)
class WeightedSums:
    """The weighted sums of a micro-batch, not yet divided, without a gradient."""

    terms: Mapping[str, Tensor]
    """For each term its sum, its sum times its coefficient and its count, ``(3,)``, float64."""
    count: Tensor
    """What the micro-batch adds to the divisor of the optimizer step, ``()``."""
    tokens: Tensor
    """Scored tokens, ``()``."""


@dataclass(frozen=True)
class MicroBatch:
    """The loss of a micro-batch, token by token and without a gradient, for whoever looks at it."""

    positions: ScoredPositions
    terms: Mapping[str, EvaluatedTerm]

    def row_losses(self) -> Tensor:
        """The loss of each row, summed over its tokens, without any normalization: ``(B,)``.

        Terms with a normalization of their own have no part in it.
        """
        rows = self.positions.rows
        total = torch.zeros(len(self.positions.mask), dtype=torch.float64, device=rows.device)
        for term in self.terms.values():
            if not term.is_own:
                total.index_add_(0, rows, weighted(term.coefficient, term.values.double()))
        return total


@dataclass(frozen=True)
class Evaluation:
    """The loss of a micro-batch."""

    total: Tensor
    """What the backward pass starts from, ``()``: weighted, not yet divided. Without a scored
    position it is a zero that still has a gradient, so that every rank has something to reduce."""
    micro_batch: MicroBatch
    metric_terms: Tensor
    """What was only looked at, ``(quantities, N)``."""


def by_name(
    terms: Mapping[str, LossTerm], names: Sequence[str], method: str
) -> dict[str, LossTerm]:
    """Put terms in the order of their names.

    Args:
        terms: As a method returned them.
        names: As the method's class states them.
        method: For the message.

    Raises:
        ValueError: If a term is missing or is not one of the names.
    """
    missing = [name for name in names if name not in terms]
    unknown = [name for name in terms if name not in names]
    if missing or unknown:
        raise ValueError(
            f"the loss of {method} has the terms {sorted(terms)}, the class states "
            f"{sorted(names)}: missing {missing}, unknown {unknown}. Return one LossTerm for each "
            "name, with coefficient 0 where there is nothing to add"
        )
    return {name: terms[name] for name in names}


def evaluate(
    logits_backend: LogitsBackend,
    scores: Scores,
    terms: Mapping[str, LossTerm],
    normalization: Normalization,
    metric_terms: Sequence[TokenTerm] = (),
) -> Evaluation:
    """Evaluate all terms: those over the batch, and what is watched there, in one pass.

    Args:
        logits_backend: Computes them.
        scores: Of the batch.
        terms: The loss.
        normalization: Gives each row its weight in the terms without one of their own.
        metric_terms: Terms at the batch's positions that are not part of the loss.
    """
    row_weights = {
        name: (term.normalization or normalization).row_weights(
            (term.scores or scores).positions.tokens_per_row
        )
        for name, term in terms.items()
    }

    def one_pass(
        stream: Scores, names: list[str], also: Sequence[TokenTerm]
    ) -> tuple[Tensor, Tensor]:
        # A term without weight needs no gradient, which is most of its cost.
        weights = [
            (terms[name].coefficient * terms[name].count_ratio * row_weights[name])[
                stream.positions.rows
            ]
            if terms[name].coefficient != 0
            else None
            for name in names
        ]
        token_terms = [*(terms[name].token_term for name in names), *also]
        return logits_backend.evaluate(
            stream.student, stream.teacher, token_terms, [*weights, *[None] * len(also)]
        )

    own = [name for name, term in terms.items() if term.scores is None]
    total, values = one_pass(scores, own, metric_terms)
    values_of = dict(zip(own, values, strict=False))
    for name, term in terms.items():
        if term.scores is not None:
            part, (values_of[name],) = one_pass(term.scores, [name], ())
            total = total + part
    evaluated = {}
    for name, term in terms.items():
        positions = (term.scores or scores).positions
        evaluated[name] = EvaluatedTerm(
            values=values_of[name],
            coefficient=term.coefficient,
            positions=positions,
            row_weights=row_weights[name],
            count=(term.normalization or normalization).count(positions.tokens_per_row),
            count_ratio=term.count_ratio,
            is_own=term.normalization is not None,
        )
    return Evaluation(total, MicroBatch(scores.positions, evaluated), values[len(own) :])


def weigh(micro_batch: MicroBatch, normalization: Normalization) -> WeightedSums:
    """Sum every term over the micro-batch with its weights.

    The sums are float64, so that their order (which a different cut into micro-batches changes)
    does not show.
    """
    scored = micro_batch.positions
    return WeightedSums(
        terms={
            name: torch.stack([term.sum, weighted(term.coefficient, term.sum), term.count])
            for name, term in micro_batch.terms.items()
        },
        count=normalization.count(scored.tokens_per_row),
        tokens=scored.tokens_per_row.sum(),
    )


class LossSums:
    """Sums over the micro-batches of one optimizer step, or of one evaluation.

    Args:
        terms: Names of the terms.

    Raises:
        ValueError: If two have one name, or one has the name of the whole.
    """

    def __init__(self, terms: tuple[str, ...]) -> None:
        if len({"loss", *terms}) <= len(terms):
            raise ValueError(
                f"the terms are {terms}; give each a name of its own, and not loss, which is the "
                "name of their sum"
            )
        self.terms = terms
        self._sums: Tensor | None = None

    def add(self, loss: WeightedSums) -> None:
        """Add a micro-batch; nothing is copied off its device."""
        head = torch.stack([loss.count.double(), loss.tokens.double()])
        row = torch.cat([head, *(loss.terms[name] for name in self.terms)])
        self._sums = row if self._sums is None else self._sums + row

    def clear(self) -> None:
        """Start again from zero."""
        self._sums = None

    def open(self, device: torch.device) -> None:
        """Let a rank to which nothing was added take part with zeros."""
        if self._sums is None:
            self._sums = torch.zeros(2 + 3 * len(self.terms), dtype=torch.float64, device=device)

    def close(self, all_reduce: Callable[[Tensor], Tensor]) -> "ReducedLoss":
        """Add up over all ranks, in one call, and start again from zero.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._sums is None:
            raise RuntimeError("an optimizer step without a training_step: nothing was added up")
        reduced = all_reduce(self._sums)
        self._sums = None
        sums, parts, counts = reduced[2:].reshape(-1, 3).unbind(-1)
        counts = divisor(counts)
        step = torch.stack([divisor(reduced[0]), reduced[1], (parts / counts).sum()])
        count, tokens, loss = step.tolist()
        means = dict(zip(self.terms, (sums / counts).tolist(), strict=True))
        return ReducedLoss(count, int(tokens), {"loss": loss, **means})


@dataclass(frozen=True)
class ReducedLoss:
    """What one optimizer step, or one evaluation, comes to over all ranks."""

    divisor: float
    """The count; 1 where nothing was scored, so that the loss is 0 and not 0/0."""
    tokens: int
    """Scored tokens."""
    means: dict[str, float]
    """The loss and each term, divided."""
