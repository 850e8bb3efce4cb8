"""Diagnosis of why the gradient of the same samples differs between partitionings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.callbacks.audit.cause_texts import (
    BATCH_STATISTICS,
    DIVIDED_BY_COUNT_TWICE,
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
    combination_weights,
    ratio,
    sketch,
    token_counts,
)
from lightning_kd.callbacks.audit.micro_batch_partitioning import (
    append_padding,
    join_batches,
    num_rows,
    padded_length,
    split_rows,
)
from lightning_kd.callbacks.audit.replay import REPLAY_ERRORS, StepReplay


class Evidence:
    """Sketches of gradients of a step's samples, computed in one process.

    Args:
        replay: Computes gradients.
        micro_batches: Micro-batches of the step, each joined over processes.
        tolerance: Relative difference up to which gradients are equal.
    """

    def __init__(self, replay: StepReplay, micro_batches: Sequence[Any], tolerance: float) -> None:
        self.replay, self.micro_batches, self.tolerance = replay, micro_batches, tolerance
        self.joined = join_batches(micro_batches)
        # All of the same length, so that padding makes no difference between them.
        self.samples = split_rows(self.joined)
        self.reference = self.sketch([self.joined])

    def sketch(self, micro_batches: Sequence[Any], **options: Any) -> Tensor:
        """Compute the gradient of a step, and return its sketch."""
        return sketch(self.replay.gradient(micro_batches, **options))

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Return whether two sketches are equal up to the tolerance."""
        return close(a, b, self.tolerance)

    def ratio(self, a: Tensor, b: Tensor) -> float | None:
        """Return the factor by which a sketch is a multiple of another; None if it is none."""
        return ratio(a, b, self.tolerance)

    def per_sample(self) -> Tensor | None:
        """Return the gradient of each sample as a step of its own, ``(n, 4096)``.

        None if the module does not support single samples, as with a batch norm over rows.
        """
        try:
            return torch.stack([self.sketch([sample]) for sample in self.samples])
        except REPLAY_ERRORS:
            return None

    def is_weighted_sum_of(self, alone: Tensor) -> bool:
        """Return whether the gradient of all samples is a weighted sum of those of single samples."""
        return combination_weights(self.reference, alone, self.tolerance) is not None

    def first_half(self, at_least: int = 1) -> list[Any]:
        """Return the first half of the samples."""
        return self.samples[: max(at_least, len(self.samples) // 2)]


def explain_randomness(evidence: Evidence) -> str:
    """Return why the same samples in one micro-batch, computed again, give another gradient."""
    again = evidence.sketch([evidence.joined])
    if not evidence.same(again, evidence.reference):
        return NOT_DETERMINISTIC
    redrawn = evidence.sketch([evidence.joined], seed=2)
    return ROW_ORDER if evidence.same(redrawn, evidence.reference) else RANDOM


def explain_partitioning(evidence: Evidence) -> list[str]:
    """Return why the gradient depends on the micro-batches, in one process."""
    replay = evidence.replay
    alone = evidence.per_sample()
    if alone is not None and evidence.is_weighted_sum_of(alone):
        return _explain_divisor(evidence, alone)
    layers = replay.batch_norms()
    with replay.in_mode("evaluation"):
        in_evaluation = Evidence(replay, evidence.micro_batches, evidence.tolerance)
        each = in_evaluation.per_sample()
        if each is not None and in_evaluation.is_weighted_sum_of(each):
            shown = ", ".join(layers[:3]) or "layers of the module that are in training mode"
            return [BATCH_STATISTICS.format(layers=shown), *_explain_divisor(in_evaluation, each)]
    return [] if alone is None else [ROWS_INTERACT]


def explain_processes(
    evidence: Evidence, in_one: Tensor, trained: Sequence[Tensor], ranks: Sequence[Sequence[Any]]
) -> str | None:
    """Return why the gradient over several processes is not that of the same samples in one.

    Args:
        evidence: Gradients in one process.
        in_one: Gradient of the step's micro-batches in one process.
        trained: Gradient on each process, after the mean over processes.
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


def detect_stale_count(evidence: Evidence, ranks: Sequence[Sequence[Any]]) -> str | None:
    """Return STALE_COUNT if the gradient is divided by a count of other samples.

    A step on some of the samples is taken first, without restoring the state: a divisor left over
    from it changes the gradient by the ratio of two counts.
    """
    some = evidence.first_half()
    after = evidence.sketch([evidence.joined], previous=[join_batches(some)])
    factor = evidence.ratio(after, evidence.reference)
    if factor is None or _is(factor, 1.0):
        return None
    windows = [[evidence.joined], *([part] for part in evidence.micro_batches), *ranks]
    windows += [[part] for window in ranks for part in window]
    for before, *others in _counts([some, *windows]):
        if before and any(_is(factor, other / before) for other in others):
            return STALE_COUNT
    return None


def detect_double_division(evidence: Evidence) -> str | None:
    """Return DIVIDED_BY_COUNT_TWICE if the gradient of repeated samples is half as large."""
    some = evidence.first_half()
    once = evidence.sketch([join_batches(some)])
    twice = evidence.sketch([join_batches([*some, *some])])
    return DIVIDED_BY_COUNT_TWICE if _is(evidence.ratio(twice, once), 0.5) else None


def _explain_divisor(evidence: Evidence, alone: Tensor) -> list[str]:
    """Return what is wrong with the divisor, given that rows do not interact.

    Args:
        evidence: Gradients of all samples together.
        alone: Gradient of each sample as a step of its own, ``(n, 4096)``.
    """
    if _depends_on_padding(evidence):
        return [PADDING]
    causes = [UNSCORED] if _counts_unscored(evidence, alone) else []
    count, mean = len(alone), alone.mean(0)
    if count < 2:
        return causes
    per_sample = evidence.sketch(evidence.samples)
    if evidence.same(per_sample, mean):
        return causes + _explain_own_count(evidence, alone)
    factors = [evidence.ratio(per_sample, other) for other in (mean, evidence.reference)]
    if any(_is(factor, 1 / count) for factor in factors):
        causes.append(DIVIDED_TWICE)
    elif any(_is(factor, count) for factor in factors):
        causes.append(NEVER_DIVIDED)
    elif evidence.ratio(per_sample, alone[-1]) is not None:
        causes.append(LAST_ONLY)
    return causes


def _explain_own_count(evidence: Evidence, alone: Tensor) -> list[str]:
    """Return what is wrong if each micro-batch is divided by a count of its own."""
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
    # A mean gives each sample a weight of its own: the weights fitted to all samples must explain
    # the gradient of half of them.
    found = combination_weights(reference, alone, evidence.tolerance)
    assert found is not None  # only then is the divisor diagnosed
    some = len(evidence.first_half(at_least=2))
    part = found[:some]
    if _is(float(found.sum()), 1.0) and float(part.sum()) > 0:
        predicted = part @ alone[:some] / part.sum()
        if evidence.same(evidence.sketch([join_batches(evidence.samples[:some])]), predicted):
            return [MEAN_OF_MEANS]
    return []


def _depends_on_padding(evidence: Evidence) -> bool:
    """Return whether padding changes more of the gradient than its scale."""
    columns = evidence.replay.max_padding(evidence.joined)
    if columns == 0:
        return False
    padded = evidence.sketch([append_padding(evidence.joined, columns)])
    return evidence.ratio(padded, evidence.reference) is None


def _counts_unscored(evidence: Evidence, alone: Tensor) -> bool:
    """Return whether padding, or text without labels, makes the gradient smaller."""
    columns = evidence.replay.max_padding(evidence.joined)
    if padded_length(evidence.joined) is None or columns == 0:
        return False
    padded = evidence.sketch([append_padding(evidence.joined, columns)])
    if not evidence.same(padded, evidence.reference):
        return True
    counts = dict(reversed(token_counts(evidence.samples)))  # of "attended", the larger
    if "labels" not in counts or counts["labels"] == counts["attended"]:
        return False  # all text has labels
    attended = torch.tensor(counts["attended"], dtype=torch.float64)
    if evidence.same(
        evidence.reference, attended @ alone / (len(alone) * attended.max().clamp(min=1))
    ) and not evidence.same(evidence.reference, alone.mean(0)):
        return False  # the longest row
    more = evidence.sketch([append_padding(evidence.joined, columns, attended=True)])
    factor = evidence.ratio(more, evidence.reference)
    return factor is not None and not _is(factor, 1.0)


def _counts(windows: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Return the count of each window, for every kind of count that a divisor may use."""
    ways: list[list[float]] = [[float(sum(num_rows(part) for part in w)) for w in windows]]
    by_window = [token_counts([s for part in w for s in split_rows(part)]) for w in windows]
    for way in range(min(len(counts) for counts in by_window)):
        ways.append([sum(counts[way][1]) for counts in by_window])
    return ways


def _is(value: float | None, expected: float) -> bool:
    return value is not None and abs(value - expected) <= 0.01 * expected
