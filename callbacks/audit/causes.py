"""Why the gradient of the same samples differs between cuts: causes that the evidence singles out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.callbacks.audit.cause_texts import (
    BATCH_STATISTICS,
    COUNTED_TWICE,
    DIVIDED_TWICE,
    DRIFT,
    LAST_ONLY,
    LONGEST_ROW,
    MEAN_OF_MEANS,
    NEVER_DIVIDED,
    NOT_DETERMINISTIC,
    OWN_COUNT,
    PADDING,
    RANDOM,
    ROW_ORDER,
    ROWS_INTERACT,
    STALE_COUNT,
    UNDIVIDED_SUM,
    UNSCORED,
    WORLD_SIZE_MISSING,
    WORLD_SIZE_TOO_MUCH,
)
from lightning_kd.callbacks.audit.evidence import (
    close,
    ratio,
    sketch,
    span_weights,
    token_counts,
)
from lightning_kd.callbacks.audit.micro_batch_partitioning import (
    join_rows,
    pad_rows,
    rows_of,
    split_rows,
    width_of,
)
from lightning_kd.callbacks.audit.replay import REFUSALS, GradientRunner


class Evidence:
    """Sketches of the gradients of a step's samples in one process.

    Args:
        run: Computes gradients.
        micro_batches: The step's, each joined over processes.
        tolerance: Relative difference that is no difference.
    """

    def __init__(self, run: GradientRunner, micro_batches: Sequence[Any], tolerance: float) -> None:
        self.run, self.micro_batches, self.tolerance = run, micro_batches, tolerance
        self.joined = join_rows(micro_batches)
        # All of one width, so that padding makes no difference between them.
        self.samples = split_rows(self.joined)
        self.reference = self.sketch([self.joined])

    def sketch(self, micro_batches: Sequence[Any], **options: Any) -> Tensor:
        """Compute the gradient of a step, and sketch it."""
        return sketch(self.run.gradient(micro_batches, **options))

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether two sketches agree."""
        return close(a, b, self.tolerance)

    def ratio(self, a: Tensor, b: Tensor) -> float | None:
        """Return by what factor a sketch is a multiple of another, if it is."""
        return ratio(a, b, self.tolerance)

    def of_each_sample(self) -> Tensor | None:
        """Return the gradient of each sample as a step of its own, ``(n, 4096)``.

        None where the module takes no single sample, such as a batch norm over rows.
        """
        try:
            return torch.stack([self.sketch([sample]) for sample in self.samples])
        except REFUSALS:
            return None

    def is_sum_of(self, alone: Tensor) -> bool:
        """Tell whether the gradient of all samples is a weighted sum of those of each."""
        return span_weights(self.reference, alone, self.tolerance) is not None

    def some_samples(self, at_least: int = 1) -> list[Any]:
        """Return the first half of the samples."""
        return self.samples[: max(at_least, len(self.samples) // 2)]


def unrepeatable(evidence: Evidence) -> str:
    """Say why the same samples in one micro-batch gave another gradient, when that was so."""
    again = evidence.sketch([evidence.joined])
    if not evidence.same(again, evidence.reference):
        return NOT_DETERMINISTIC
    redrawn = evidence.sketch([evidence.joined], seed=2)
    return ROW_ORDER if evidence.same(redrawn, evidence.reference) else RANDOM


def of_cuts(evidence: Evidence) -> list[str]:
    """Say why the gradient depends on how samples are cut into micro-batches in one process."""
    run = evidence.run
    alone = evidence.of_each_sample()
    if alone is not None and evidence.is_sum_of(alone):
        return _of_divisor(evidence, alone)
    layers = run.batch_norms()
    with run.in_mode("frozen"):
        frozen = Evidence(run, evidence.micro_batches, evidence.tolerance)
        each = frozen.of_each_sample()
        if each is not None and frozen.is_sum_of(each):
            shown = ", ".join(layers[:3]) or "layers of the module that are in training mode"
            return [BATCH_STATISTICS.format(layers=shown), *_of_divisor(frozen, each)]
    return [] if alone is None else [ROWS_INTERACT]


def of_ranks(
    evidence: Evidence, in_one: Tensor, trained: Sequence[Tensor], ranks: Sequence[Sequence[Any]]
) -> str | None:
    """Say why the gradient over several processes is not that of the same micro-batches in one.

    Args:
        evidence: In one process.
        in_one: The gradient of the step's micro-batches in one process.
        trained: The gradient that each process has, after the mean over processes.
        ranks: The micro-batches of each process.
    """
    count, first = len(ranks), trained[0]
    if not all(evidence.same(other, first) for other in trained):
        multiples = [evidence.ratio(other, first) for other in trained]
        return None if None in multiples else DRIFT
    if evidence.same(first, in_one):
        return None
    factor = evidence.ratio(first, in_one)
    if _is(factor, 1 / count):
        return WORLD_SIZE_MISSING
    own = torch.stack([evidence.sketch(window) for window in ranks]).mean(0)
    if _is(factor, count) or _is(evidence.ratio(first, own), count):
        return WORLD_SIZE_TOO_MUCH
    return OWN_COUNT if evidence.same(first, own) else None


def of_history(evidence: Evidence, ranks: Sequence[Sequence[Any]]) -> str | None:
    """Return STALE_COUNT where a count of other samples divides the gradient.

    A step on some of the samples is taken first, without restoring the state: a divisor that is
    left from it changes the gradient by the ratio of two counts.
    """
    some = evidence.some_samples()
    after = evidence.sketch([evidence.joined], after=[join_rows(some)])
    factor = evidence.ratio(after, evidence.reference)
    if factor is None or _is(factor, 1.0):
        return None
    windows = [[evidence.joined], *([part] for part in evidence.micro_batches), *ranks]
    windows += [[part] for window in ranks for part in window]
    for before, *others in _counts([some, *windows]):
        if before and any(_is(factor, other / before) for other in others):
            return STALE_COUNT
    return None


def of_repetition(evidence: Evidence) -> str | None:
    """Return COUNTED_TWICE where samples that come twice have half the gradient."""
    some = evidence.some_samples()
    once = evidence.sketch([join_rows(some)])
    twice = evidence.sketch([join_rows([*some, *some])])
    return COUNTED_TWICE if _is(evidence.ratio(twice, once), 0.5) else None


def _of_divisor(evidence: Evidence, alone: Tensor) -> list[str]:
    """Say what is wrong where rows do not interact: the divisor, as a rule.

    Args:
        evidence: Of all samples.
        alone: The gradient of each sample as a step of its own.
    """
    if _depends_on_padding(evidence):
        return [PADDING]
    causes = [UNSCORED] if _counts_unscored(evidence, alone) else []
    count, mean = len(alone), alone.mean(0)
    if count < 2:
        return causes
    per_sample = evidence.sketch(evidence.samples)
    if evidence.same(per_sample, mean):
        return causes + _of_own_count(evidence, alone)
    factors = [evidence.ratio(per_sample, other) for other in (mean, evidence.reference)]
    if any(_is(factor, 1 / count) for factor in factors):
        causes.append(DIVIDED_TWICE)
    elif any(_is(factor, count) for factor in factors):
        causes.append(NEVER_DIVIDED)
    elif evidence.ratio(per_sample, alone[-1]) is not None:
        causes.append(LAST_ONLY)
    return causes


def _of_own_count(evidence: Evidence, alone: Tensor) -> list[str]:
    """Say by what count of its own each micro-batch is divided, if by any."""
    reference, count = evidence.reference, len(alone)
    if evidence.same(reference, alone.mean(0)):
        in_parts = evidence.sketch(evidence.micro_batches)
        return [] if evidence.same(in_parts, reference) else [MEAN_OF_MEANS]
    if evidence.same(reference, alone.sum(0)):
        return [UNDIVIDED_SUM]
    for _, counts in token_counts(evidence.samples):
        weights = torch.tensor(counts, dtype=torch.float64)
        if max(counts) > 0 and evidence.same(reference, weights @ alone / (count * weights.max())):
            return [LONGEST_ROW]
    # A mean weighs each sample by something of its own: the weights found for all of them must
    # explain the gradient of some of them.
    found = span_weights(reference, alone, evidence.tolerance)
    assert found is not None  # only then is the divisor looked at
    some = len(evidence.some_samples(at_least=2))
    part = found[:some]
    if _is(float(found.sum()), 1.0) and float(part.sum()) > 0:
        predicted = part @ alone[:some] / part.sum()
        if evidence.same(evidence.sketch([join_rows(evidence.samples[:some])]), predicted):
            return [MEAN_OF_MEANS]
    return []


def _depends_on_padding(evidence: Evidence) -> bool:
    """Tell whether padding does more to the gradient than make it smaller."""
    columns = evidence.run.room_for_columns(evidence.joined)
    if columns == 0:
        return False
    padded = evidence.sketch([pad_rows(evidence.joined, columns)])
    return evidence.ratio(padded, evidence.reference) is None


def _counts_unscored(evidence: Evidence, alone: Tensor) -> bool:
    """Tell whether padding, or text without labels, makes the gradient smaller."""
    columns = evidence.run.room_for_columns(evidence.joined)
    if width_of(evidence.joined) is None or columns == 0:
        return False
    padded = evidence.sketch([pad_rows(evidence.joined, columns)])
    if not evidence.same(padded, evidence.reference):
        return True
    counts = dict(reversed(token_counts(evidence.samples)))  # of "attended", the larger
    if "labels" not in counts or counts["labels"] == counts["attended"]:
        return False  # there is no text without a label
    attended = torch.tensor(counts["attended"], dtype=torch.float64)
    if evidence.same(
        evidence.reference, attended @ alone / (len(alone) * attended.max().clamp(min=1))
    ) and not evidence.same(evidence.reference, alone.mean(0)):
        return False  # the longest row
    more = evidence.sketch([pad_rows(evidence.joined, columns, attended=True)])
    factor = evidence.ratio(more, evidence.reference)
    return factor is not None and not _is(factor, 1.0)


def _counts(windows: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Count each window in every way that a divisor may count it: one list for each way."""
    ways: list[list[float]] = [[float(sum(rows_of(part) for part in w)) for w in windows]]
    by_window = [token_counts([s for part in w for s in split_rows(part)]) for w in windows]
    for way in range(min(len(counts) for counts in by_window)):
        ways.append([sum(counts[way][1]) for counts in by_window])
    return ways


def _is(value: float | None, expected: float) -> bool:
    return value is not None and abs(value - expected) <= 0.01 * expected
