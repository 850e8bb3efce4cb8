"""A loss as named terms per token, and the sums that one optimizer step adds up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_kd.normalization import Normalization
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class LossTerm:
    """One named part of a loss, before any reduction."""

    values: Tensor
    """Nats at each scored position, ``(N,)``."""
    coefficient: float = 1.0
    """Weight of the term in the loss."""
    row_scale: Tensor | None = None
    """A further factor for every position of a row, ``(B,)``; only where a paper weighs a term so."""
    stream: ScoredPositions | None = None
    """The positions of a term over other data than the batch's; ``row_scale`` is then the whole
    weight of its tokens before the division."""

    def row_weights(self, scored: ScoredPositions, normalization: Normalization) -> Tensor:
        """What each token of a row weighs before the coefficient and the division: ``(B,)``."""
        if self.stream is None:
            weights = normalization.row_weights(scored.tokens_per_row)
        else:
            weights = torch.ones_like(self.stream.tokens_per_row, dtype=torch.float64)
        return weights if self.row_scale is None else weights * self.row_scale


@dataclass(frozen=True)
class WeightedLoss:
    """The weighted sums of a micro-batch, not yet divided."""

    total: Tensor
    """What the backward pass starts from, ``()``."""
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
    terms: Mapping[str, LossTerm]

    @classmethod
    def of(cls, terms: Mapping[str, LossTerm], positions: ScoredPositions) -> "MicroBatch":
        """Keep the values, let go of their graph."""
        kept = {name: replace(term, values=term.values.detach()) for name, term in terms.items()}
        return cls(positions, kept)

    def row_losses(self) -> Tensor:
        """The loss of each row, summed over its tokens, without any normalization: ``(B,)``.

        Terms over other data have no part in it.
        """
        rows = self.positions.rows
        total = torch.zeros(len(self.positions.mask), dtype=torch.float64, device=rows.device)
        for term in self.terms.values():
            if term.stream is not None:
                continue
            values = term.coefficient * term.values.double()
            scale = 1.0 if term.row_scale is None else term.row_scale[rows]
            total.index_add_(0, rows, values * scale)
        return total


def weigh(
    terms: Mapping[str, LossTerm], scored: ScoredPositions, normalization: Normalization
) -> WeightedLoss:
    """Sum every term over the micro-batch with the weights of ``normalization``.

    The sums are float64, so that their order (which a different cut into micro-batches changes)
    does not show. Without a scored position they are zeros that still have a gradient, so that
    every rank has something to reduce.
    """
    sums = []
    for term in terms.values():
        weights = term.row_weights(scored, normalization)
        sums.append((term.values * weights[(term.stream or scored).rows]).sum())
    coefficients = [term.coefficient for term in terms.values()]
    total = torch.stack([c * s for c, s in zip(coefficients, sums, strict=True)]).sum()
    return WeightedLoss(
        total=total,
        sums=torch.stack([total, *sums]).detach(),
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

    def add(self, loss: WeightedLoss) -> None:
        """Add a micro-batch; nothing is copied off its device."""
        row = torch.cat([torch.stack([loss.count.double(), loss.tokens.double()]), loss.sums])
        self._sums = row if self._sums is None else self._sums + row

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
