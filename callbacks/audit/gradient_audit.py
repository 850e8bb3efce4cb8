"""Comparison of the gradients of the same samples in different micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from lightning_kd.callbacks.audit import diagnosis
from lightning_kd.callbacks.audit.cause_texts import MEAN_OF_MEANS
from lightning_kd.callbacks.audit.diagnosis import Evidence
from lightning_kd.callbacks.audit.evidence import relative_difference, sketch
from lightning_kd.callbacks.audit.micro_batch_partitioning import (
    append_padding,
    gather_batches,
    iterate_tensors,
    join_batches,
    num_rows,
    padded_length,
    partition,
    split_rows,
)
from lightning_kd.callbacks.audit.replay import REPLAY_ERRORS, Gradient, StepReplay, isolated
from lightning_kd.callbacks.audit.report import ALWAYS_WRONG, AuditReport
from lightning_kd.callbacks.audit.single_process import SingleProcess
from lightning_kd.callbacks.audit.state_snapshot import StateSnapshot
from lightning_kd.collectives import gather_objects


def audit_window(
    trainer: L.Trainer,
    module: L.LightningModule,
    window: Sequence[Any],
    tolerance: float | None = None,
    finish: Callable[[], object] | None = None,
) -> AuditReport:
    """Compute the gradient of a step's samples in several partitionings, and compare.

    Each gradient is computed as in Lightning's automatic optimization: ``training_step`` on each
    micro-batch, its loss divided by their number, the backward pass, the mean over ranks, and the
    module's hooks up to ``configure_gradient_clipping``. The module stays in training mode if it
    draws no random numbers there; otherwise dropout is off, so that only the partitioning differs.
    All ranks call this together. Weights, gradients, random states, buffers, and all that can be
    reached from the module's attributes are restored before it returns.

    Args:
        trainer: The trainer of the module.
        module: Any module with automatic optimization.
        window: The micro-batches of an optimizer step on this rank.
        tolerance: Relative difference above which a cause is looked for. Defaults to 1e-3, and to
            0.05 if anything is computed in half precision.
        finish: Hook of the module that is still to be called for the step that was just taken: its
            ``on_train_batch_end``.
    """
    if tolerance is None:
        tolerance = 0.05 if _in_half_precision(trainer, module, window) else 1e-3
    with isolated(trainer, module):
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        before = start = StateSnapshot(module, *groups)
        try:
            if finish is not None:
                finish()
                start = StateSnapshot(module, *groups)
            report = _Audit(trainer, module, start, tolerance).report(window)
        finally:
            before.restore()
    return replace(report, changed_weights=before.changed_weights())


class _Audit:
    """A single audit, on all ranks together.

    Work that may fail on one rank is done without collectives; the ranks then exchange whether it
    failed, so that none waits for another.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        snapshot: StateSnapshot,
        tolerance: float,
    ) -> None:
        self.trainer, self.snapshot, self.tolerance = trainer, snapshot, tolerance
        self.device = trainer.strategy.root_device
        self.single_process = SingleProcess(trainer, module)
        self.replay = StepReplay(trainer, module, snapshot, self.single_process)

    def report(self, window: Sequence[Any]) -> AuditReport:
        """Audit the micro-batches of a step; all ranks return the same."""
        several = self.trainer.world_size > 1
        self.ranks = gather_batches(window, self.device) if several else [list(window)]
        reason = self._reason_to_skip()
        if reason is None:
            failed, reference = self._together(self._reference)
            if failed is None and reference is not None:
                as_trained = self.replay.gradient(window, over_ranks=several)
                mine = relative_difference(as_trained, reference), sketch(as_trained)
                everywhere = gather_objects(mine)
                failed, report = self._together(lambda: self._compare(everywhere, reference))
                if failed is None and isinstance(report, AuditReport):
                    return report
            reason = failed
        return AuditReport(self.tolerance, not_audited=reason)

    def _reason_to_skip(self) -> str | None:
        """Return why this step cannot be audited, the same on every rank; None if it can."""
        found = next(filter(None, gather_objects(self.snapshot.cannot_restore[:3])), None)
        if found:
            return (
                f"{', '.join(found)} cannot be restored after it was read (an iterator, a file), so "
                "the run would continue differently; keep it out of the module"
            )
        sizes = {len(window) for window in self.ranks}
        if len(sizes) > 1:
            return (
                f"processes have {sorted(sizes)} micro-batches in this step, and must have as many"
            )
        try:
            self.micro_batches = self._joined_over_ranks()
        except ValueError as error:
            return str(error)
        return None if self.micro_batches else "the step has no samples"

    def _joined_over_ranks(self) -> list[Any]:
        """Join the micro-batches that were trained on at the same time."""
        at_once = [[p for p in parts if num_rows(p)] for parts in zip(*self.ranks, strict=True)]
        joined = [join_batches(parts) for parts in at_once if parts]
        if joined:
            join_batches(joined)
        return joined

    def _reference(self) -> Gradient:
        """Choose the mode, and compute the gradient of all samples in one micro-batch."""
        joined = [join_batches(self.micro_batches)]
        draws = []
        for mode in ("training", "no_dropout"):
            self.replay.mode = mode
            gradient = self.replay.gradient(joined)
            draws.append(self.snapshot.random_fingerprint())
            if mode == "training":
                in_training = gradient
        if draws[0] == draws[1]:
            self.replay.mode, gradient = "training", in_training
        if not all(bool(part.isfinite().all()) for part in gradient):
            raise FloatingPointError("the gradient of the step is not finite")
        return gradient

    def _compare(self, trained: Sequence[tuple[float, Tensor]], reference: Gradient) -> AuditReport:
        """Compare the other partitionings, and determine the cause of differences.

        Args:
            trained: For each rank, the difference of its gradient from the reference, and its sketch.
            reference: The gradient of all samples in one micro-batch and one process.
        """
        replay, samples = self.replay, [s for part in self.micro_batches for s in split_rows(part)]
        sizes = [num_rows(part) for part in self.micro_batches]
        joined = join_batches(samples)
        shuffled = samples[1::2] + samples[::2]
        columns = replay.max_padding(joined)
        partitionings: dict[str, Callable[[], Gradient]] = {
            "reversed": lambda: replay.gradient(partition(samples[::-1], sizes)),
            "repeated": lambda: replay.gradient([join_batches(shuffled)], seed=1),
            "per_sample": lambda: replay.gradient(samples),
            "padded": lambda: replay.gradient([append_padding(joined, columns)]),
        }
        differences, skipped = {"as_trained": max(difference for difference, _ in trained)}, None
        if columns == 0:
            del partitionings["padded"]
            if padded_length(joined) is not None:
                skipped = "padded (no longer rows fit into the embeddings of the module)"
        for name, gradient in partitionings.items():
            try:
                differences[name] = relative_difference(gradient(), reference)
            except REPLAY_ERRORS as error:
                skipped = f"{name} (the module raised: {error})"
        causes, others = self._causes(differences, [of_rank for _, of_rank in trained])
        if self.single_process.was_bypassed():
            raise ValueError(
                "the module communicates in a process group of its own that the audit cannot "
                "replace; keep the group as an attribute of the module"
            )
        return AuditReport(self.tolerance, differences, causes, others, skipped=skipped)

    def _causes(
        self, differences: dict[str, float], trained: Sequence[Tensor]
    ) -> tuple[list[str], list[str]]:
        """Return the causes of errors in this step, and of those in other partitionings."""
        evidence = Evidence(self.replay, self.micro_batches, self.tolerance)
        if not differences["repeated"] <= self.tolerance:
            return [diagnosis.explain_randomness(evidence)], []
        causes: list[str | None] = []
        others: list[str] = []
        if not all(difference <= self.tolerance for difference in differences.values()):
            others = diagnosis.explain_partitioning(evidence)
            in_one = evidence.sketch(self.micro_batches)
            if not differences["reversed"] <= self.tolerance or not evidence.same(
                in_one, evidence.reference
            ):
                causes, others = [*others], []
            causes += [cause for cause in others if cause in ALWAYS_WRONG]
            others = [cause for cause in others if cause not in ALWAYS_WRONG]
            # A mean of micro-batch means is also one over processes.
            if MEAN_OF_MEANS not in causes and len(trained) > 1:
                causes.append(diagnosis.explain_processes(evidence, in_one, trained, self.ranks))
        causes.append(diagnosis.detect_stale_count(evidence, self.ranks))
        causes.append(diagnosis.detect_double_division(evidence))
        return [cause for cause in causes if cause is not None], others

    def _together(self, compute: Callable[[], Any]) -> tuple[str | None, Any]:
        """Compute as a single process; return why it failed on any rank, and the result.

        A report is that of the first rank, so that all ranks act alike.
        """
        failed, result = None, None
        with self.single_process.active():
            try:
                result = compute()
            except REPLAY_ERRORS as error:
                failed = f"{type(error).__name__}: {error}"
        answers = gather_objects((failed, result if isinstance(result, AuditReport) else None))
        first = next((reason for reason, _ in answers if reason is not None), None)
        return first, answers[0][1] or result


def _in_half_precision(
    trainer: L.Trainer, module: L.LightningModule, window: Sequence[Any]
) -> bool:
    """Return whether weights, data or the trainer's precision have 16 bits or fewer."""
    if str(trainer.precision).startswith(("16", "bf16", "transformer-engine")):
        return True
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    for batch in window:
        found += [tensor for _, tensor in iterate_tensors(batch)]
    return any(t.is_floating_point() and t.element_size() < 4 for t in found)
