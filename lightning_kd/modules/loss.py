"""From what models say to a loss: named terms per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused import LazyLogits, TeacherAnswer, TokenTerm, total_of
from lightning_kd.models import LogitsBackend
from lightning_kd.normalization import Normalization
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class Scores:
    """Logits of the student and answer of the teacher at the scored positions of a micro-batch."""

    positions: ScoredPositions
    student: LazyLogits
    teacher: TeacherAnswer | None = None
    uncut: "Scores | None" = None
    """The same over all tokens, where both were cut to a shared vocabulary."""

    def narrowed(self, width: int) -> "Scores":
        """Return both over the first ``width`` tokens of the vocabulary, with these beside them."""
        assert self.teacher is not None  # without one there is nothing to share
        student, teacher = self.student.narrowed(width), self.teacher.narrowed(width)
        return Scores(self.positions, student, teacher, self)


@dataclass(frozen=True)
class LossTerm:
    """One named part of a loss: a number at each position, and its weight.

    Example:
        >>> from lightning_kd.fused import CrossEntropy
        >>> LossTerm(CrossEntropy(torch.tensor([2, 3])), coefficient=0.5).coefficient
        0.5
    """

    per_token: TokenTerm | Tensor
    """Nats at each position: a term that the chunked pass evaluates, or ready values with a gradient,
    ``(N,)``, where one position alone does not tell them (pairs of tokens, hidden states)."""
    coefficient: float = 1.0
    """Weight of the term in the loss."""
    positions: ScoredPositions | None = None
    """Of ready values; None for the batch's."""
    scores: Scores | None = None
    """For a token term over other data than the batch's."""


@dataclass(frozen=True)
class EvaluatedTerm:
    """A term as numbers, without a gradient."""

    values: Tensor
    """Nats at each position, ``(N,)``."""
    coefficient: float
    positions: ScoredPositions
    """The batch's, or the term's own."""
    row_weights: Tensor
    """Weight of each token of a row before coefficient and division, ``(B,)``."""
    count: Tensor
    """The micro-batch's part of the divisor of the term, ``()``."""
    count_ratio: Tensor | float
    """The module's count of the step over the term's own; 1 for the module's normalization."""
    has_own_normalization: bool

    def sums(self) -> Tensor:
        """Return the weighted sum, it times the coefficient, and the count: ``(3,)``, float64."""
        total = weighted(self.row_weights[self.positions.rows], self.values).sum()
        return torch.stack([total, weighted(self.coefficient, total), self.count])


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of a micro-batch, token by token, without a gradient and not yet divided."""

    positions: ScoredPositions
    terms: Mapping[str, EvaluatedTerm]
    count: Tensor
    """The micro-batch's part of the divisor of the optimizer step, ``()``."""

    def row_losses(self) -> Tensor:
        """Return the loss of each row, summed over its tokens, without any normalization: ``(B,)``.

        Terms with a normalization of their own have no part in it.
        """
        rows = self.positions.rows
        total = torch.zeros(len(self.positions.mask), dtype=torch.float64, device=rows.device)
        for term in self.terms.values():
            if not term.has_own_normalization:
                total.index_add_(0, rows, weighted(term.coefficient, term.values.double()))
        return total


def evaluate(
    logits_backend: LogitsBackend,
    scores: Scores,
    terms: Mapping[str, LossTerm],
    normalization: Normalization,
    *,
    own: Mapping[str, Normalization] | None = None,
    count_ratios: Mapping[str, Tensor | float] | None = None,
    metric_terms: Sequence[TokenTerm] = (),
) -> tuple[Tensor, MicroBatchLoss, Tensor]:
    """Evaluate all terms: the token terms over the batch, and its metrics, in one pass.

    Args:
        logits_backend: Computes them: ``FusedLogits`` by a ``ChunkedPass``, whose gradients in hidden
            states and head an ``autograd.Function`` hands on (``fused/autograd.py``).
        scores: Of the batch.
        terms: The loss.
        normalization: Gives each row its weight in the terms without one of their own.
        own: Normalizations of single terms.
        count_ratios: For terms with one of their own, the count of the optimizer step under
            ``normalization`` over the term's: all gradients are divided by the former. Defaults to
            1, in an evaluation, which has no gradient.
        metric_terms: Terms at the batch's positions that are not part of the loss.

    Returns:
        The weighted sum that the backward pass starts from, ``()``, which has a gradient also where
        nothing is scored; the loss as numbers; the values of the metric terms, ``(terms, N)``.

    Raises:
        ValueError: If ready values do not fit their positions or have no gradient, or a term over
            other positions than the batch's has no normalization of its own.
    """
    own, count_ratios = own or {}, count_ratios or {}
    places = {n: _places(n, term, scores, has_own=n in own) for n, term in terms.items()}
    divided_by = {name: own.get(name, normalization) for name in terms}
    row_weights = {n: divided_by[n].row_weights(places[n].tokens_per_row) for n in terms}

    def weights(name: str) -> Tensor | None:
        # A term without weight needs no gradient, which is most of its cost.
        if terms[name].coefficient == 0:
            return None
        ratio = count_ratios.get(name, 1.0)
        return (terms[name].coefficient * ratio * row_weights[name])[places[name].rows]

    def one_pass(
        stream: Scores, token_terms: Mapping[str, TokenTerm], also: Sequence[TokenTerm] = ()
    ) -> tuple[Tensor, Tensor]:
        both, weighted_by = [*token_terms.values(), *also], [*map(weights, token_terms)]
        weighted_by += [None] * len(also)
        return logits_backend.evaluate(stream.student, stream.teacher, both, weighted_by)

    ready = {n: t.per_token for n, t in terms.items() if isinstance(t.per_token, Tensor)}
    chunked = {n: t.per_token for n, t in terms.items() if isinstance(t.per_token, TokenTerm)}
    elsewhere = {n: s for n in chunked if (s := terms[n].scores) is not None}
    of_batch = {name: term for name, term in chunked.items() if name not in elsewhere}
    total, values = one_pass(scores, of_batch, metric_terms)
    values_of = dict(zip(of_batch, values, strict=False))
    for name, stream in elsewhere.items():
        part, (values_of[name],) = one_pass(stream, {name: chunked[name]})
        total = total + part
    for name, tensor in ready.items():
        total = total + total_of(tensor[None], [weights(name)])
        values_of[name] = tensor.detach()
    evaluated = {
        name: EvaluatedTerm(
            values=values_of[name],
            coefficient=term.coefficient,
            positions=places[name],
            row_weights=row_weights[name],
            count=divided_by[name].count(places[name].tokens_per_row),
            count_ratio=count_ratios.get(name, 1.0),
            has_own_normalization=name in own,
        )
        for name, term in terms.items()
    }
    count = normalization.count(scores.positions.tokens_per_row)
    return total, MicroBatchLoss(scores.positions, evaluated, count), values[len(of_batch) :]


def _places(name: str, term: LossTerm, scores: Scores, *, has_own: bool) -> ScoredPositions:
    """Return the positions of a term, and refuse what cannot be trained on there."""
    places = term.positions or (term.scores or scores).positions
    if places is not scores.positions and not has_own:
        raise ValueError(
            f"the term {name} is over other positions than the batch's, which the module's count "
            "leaves out; give it a normalization of its own (term_normalizations, term_positions)"
        )
    if isinstance(term.per_token, TokenTerm):
        if term.positions is not None:
            raise ValueError(
                f"the term {name} is a token term, evaluated at all positions of its scores: leave "
                "positions out, or give ready values"
            )
        return places
    shape, count = tuple(term.per_token.shape), len(places.targets)
    if shape != (count,):
        raise ValueError(
            f"the term {name} has ready values of shape {shape} for {count} positions; give one "
            "number for each position, in row order"
        )
    trains = torch.is_grad_enabled() and term.coefficient != 0 and count > 0
    if trains and not term.per_token.requires_grad:
        raise ValueError(
            f"the term {name} has ready values without a gradient, so nothing would be learned "
            "from it: compute them from the student's scores (logits_backend.per_token), or give "
            "it the coefficient 0"
        )
    return places
