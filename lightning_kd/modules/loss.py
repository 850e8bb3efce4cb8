"""A loss as named terms per token, and the sums that one optimizer step adds up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.divergences.log_space import weighted
from lightning_kd.evaluation import LogitSource, Quantity, TeacherLogits
from lightning_kd.models import Logits
from lightning_kd.normalization import Normalization
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class Scores:
    """What student and teacher say at the scored positions of a micro-batch."""

    positions: ScoredPositions
    student: LogitSource
    teacher: TeacherLogits | None = None


@dataclass(frozen=True)
class LossTerm:
    """One named part of a loss: what it is at a position, and what it weighs."""

    quantity: Quantity
    """Nats at each scored position."""
    coefficient: float = 1.0
    """Weight of the term in the loss."""
    row_scale: Tensor | None = None
    """A further factor for every position of a row, ``(B,)``; only where a paper weighs a term so."""
    scores: Scores | None = None
    """For a term over other data than the batch's; ``row_scale`` is then the whole weight of its
    tokens before the division."""

    def row_weights(self, scored: ScoredPositions, normalization: Normalization) -> Tensor:
        """What each token of a row weighs before the coefficient and the division: ``(B,)``."""
        if self.scores is None:
            weights = normalization.row_weights(scored.tokens_per_row)
        else:
            weights = torch.ones_like(self.scores.positions.tokens_per_row, dtype=torch.float64)
        return weights if self.row_scale is None else weights * self.row_scale


@dataclass(frozen=True)
class EvaluatedTerm:
    """A term as numbers, without a gradient."""

    values: Tensor
    """Nats at each scored position, ``(N,)``."""
    coefficient: float
    row_scale: Tensor | None
    row_weights: Tensor
    """What each token of a row weighs before the coefficient and the division, ``(B,)``."""
    stream: ScoredPositions | None
    """The positions of a term over other data than the batch's."""


@dataclass(frozen=True)
class WeightedSums:
    """The weighted sums of a micro-batch, not yet divided, without a gradient."""

    sums: Tensor
    """Loss and terms (without their coefficients), detached, ``(1 + terms,)``, float64."""
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

        Terms over other data have no part in it.
        """
        rows = self.positions.rows
        total = torch.zeros(len(self.positions.mask), dtype=torch.float64, device=rows.device)
        for term in self.terms.values():
            if term.stream is not None:
                continue
            scale = 1.0 if term.row_scale is None else term.row_scale[rows]
            values = weighted(term.coefficient, weighted(scale, term.values.double()))
            total.index_add_(0, rows, values)
        return total


@dataclass(frozen=True)
class Evaluation:
    """The loss of a micro-batch."""

    total: Tensor
    """What the backward pass starts from, ``()``: weighted, not yet divided. Without a scored
    position it is a zero that still has a gradient, so that every rank has something to reduce."""
    micro_batch: MicroBatch
    watched: Tensor
    """What was only looked at, ``(quantities, N)``."""


def evaluate(
    logits: Logits,
    scores: Scores,
    terms: Mapping[str, LossTerm],
    normalization: Normalization,
    watched: Sequence[Quantity] = (),
) -> Evaluation:
    """Evaluate all terms: those over the batch, and what is watched there, in one pass.

    Args:
        logits: How logits come about.
        scores: Of the batch.
        terms: The loss.
        normalization: Gives each row its weight.
        watched: Quantities at the batch's positions that are not part of the loss.
    """
    row_weights = {n: t.row_weights(scores.positions, normalization) for n, t in terms.items()}

    def one_pass(
        stream: Scores, names: list[str], also: Sequence[Quantity]
    ) -> tuple[Tensor, Tensor]:
        # A term without weight needs no gradient, which is most of its cost.
        weights = [
            (terms[name].coefficient * row_weights[name])[stream.positions.rows]
            if terms[name].coefficient != 0
            else None
            for name in names
        ]
        quantities = [*(terms[name].quantity for name in names), *also]
        return logits.evaluate(
            stream.student, stream.teacher, quantities, [*weights, *[None] * len(also)]
        )

    own = [name for name, term in terms.items() if term.scores is None]
    total, values = one_pass(scores, own, watched)
    by_name = dict(zip(own, values, strict=False))
    for name, term in terms.items():
        if term.scores is not None:
            part, (by_name[name],) = one_pass(term.scores, [name], ())
            total = total + part
    evaluated = {
        name: EvaluatedTerm(
            by_name[name],
            term.coefficient,
            term.row_scale,
            row_weights[name],
            None if term.scores is None else term.scores.positions,
        )
        for name, term in terms.items()
    }
    return Evaluation(total, MicroBatch(scores.positions, evaluated), values[len(own) :])


def weigh(micro_batch: MicroBatch, normalization: Normalization) -> WeightedSums:
    """Sum every term over the micro-batch with its weights.

    The sums are float64, so that their order (which a different cut into micro-batches changes)
    does not show.
    """
    scored, terms = micro_batch.positions, micro_batch.terms.values()
    sums = [weighted(t.row_weights[(t.stream or scored).rows], t.values).sum() for t in terms]
    total = torch.stack(
        [weighted(t.coefficient, s) for t, s in zip(terms, sums, strict=True)]
    ).sum()
    return WeightedSums(
        sums=torch.stack([total, *sums]),
        count=normalization.count(scored.tokens_per_row),
        tokens=scored.tokens_per_row.sum(),
    )


class LossSums:
    """Sums over the micro-batches of one optimizer step, or of one evaluation.

    Args:
        terms: Names of the terms, in the order they are added.
    """

    def __init__(self, terms: tuple[str, ...]) -> None:
        self.terms = terms
        self._sums: Tensor | None = None

    def add(self, loss: WeightedSums) -> None:
        """Add a micro-batch; nothing is copied off its device."""
        row = torch.cat([torch.stack([loss.count.double(), loss.tokens.double()]), loss.sums])
        self._sums = row if self._sums is None else self._sums + row

    def clear(self) -> None:
        """Start again from zero."""
        self._sums = None

    def close(self, all_reduce: Callable[[Tensor], Tensor]) -> "ReducedLoss":
        """Add up over all ranks, in one call, and start again from zero.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._sums is None:
            raise RuntimeError("an optimizer step without a training_step: nothing was added up")
        count, tokens, *sums = all_reduce(self._sums).tolist()
        self._sums = None
        divisor = count if count > 0 else 1.0
        means = dict(zip(("loss", *self.terms), (s / divisor for s in sums), strict=True))
        return ReducedLoss(divisor, int(tokens), means)


@dataclass(frozen=True)
class ReducedLoss:
    """What one optimizer step, or one evaluation, comes to over all ranks."""

    divisor: float
    """The count; 1 where nothing was scored, so that the loss is 0 and not 0/0."""
    tokens: int
    """Scored tokens."""
    means: dict[str, float]
    """The loss and each term, divided."""
