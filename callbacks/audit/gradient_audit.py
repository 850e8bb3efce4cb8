"""The same samples, cut differently: does the gradient stay the same?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from lightning_kd.callbacks.audit import causes as gradient_causes
from lightning_kd.callbacks.audit.cause_texts import MEAN_OF_MEANS
from lightning_kd.callbacks.audit.causes import Evidence
from lightning_kd.callbacks.audit.evidence import relative_difference, sketch
from lightning_kd.callbacks.audit.micro_batch_partitioning import (
    gather_batches,
    join_rows,
    pad_rows,
    regroup,
    rows_of,
    split_rows,
    tensors_of,
    width_of,
)
from lightning_kd.callbacks.audit.one_process import OneProcessView
from lightning_kd.callbacks.audit.replay import REFUSALS, Gradient, GradientRunner, silenced
from lightning_kd.callbacks.audit.report import ALWAYS_WRONG, AuditReport
from lightning_kd.callbacks.audit.state_snapshot import StateSnapshot
from lightning_kd.collectives import gather_objects


def audit_window(
    trainer: L.Trainer,
    module: L.LightningModule,
    window: Sequence[Any],
    tolerance: float | None = None,
    finish: Callable[[], object] | None = None,
) -> AuditReport:
    """Compute the gradient of a window's samples in several cuts, and compare.

    Each gradient goes the way of Lightning's automatic optimization: ``training_step`` on each
    micro-batch, its loss divided by their number, the backward pass, the mean over ranks, and the
    module's hooks up to ``configure_gradient_clipping``. The module stays in training mode where it
    draws no random numbers there; otherwise dropout is off, so that only the cut differs. All ranks
    call it together. Weights, gradients, random states, buffers, the module's own attributes and
    what they lead to are as before when it returns.

    Args:
        trainer: The trainer of the module.
        module: Any module with automatic optimization.
        window: The micro-batches of an optimizer step on this rank.
        tolerance: Relative difference above which a cause is looked for; 1e-3 when not given, and
            0.05 where anything is computed in half precision.
        finish: Ends the step that was just taken, where the module has yet to: its
            ``on_train_batch_end``.
    """
    if tolerance is None:
        tolerance = 0.05 if _in_half_precision(trainer, module, window) else 1e-3
    with silenced(trainer, module):
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        before = start = StateSnapshot(module, *groups)
        try:
            if finish is not None:
                finish()
                start = StateSnapshot(module, *groups)
            report = _Audit(trainer, module, start, tolerance).report(window)
        finally:
            before.restore()
    return replace(report, disturbed=before.changed_weights())


class _Audit:
    """One audit, on all ranks together.

    What may fail on one rank alone happens while no rank waits for another; then all ranks tell
    each other whether it did.
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
        self.view = OneProcessView(trainer, module)
        self.run = GradientRunner(trainer, module, snapshot, self.view)

    def report(self, window: Sequence[Any]) -> AuditReport:
        several = self.trainer.world_size > 1
        self.ranks = gather_batches(window, self.device) if several else [list(window)]
        reason = self._reason_against()
        if reason is None:
            failed, reference = self._together(self._reference)
            if failed is None and reference is not None:
                as_trained = self.run.gradient(window, over_ranks=several)
                mine = relative_difference(as_trained, reference), sketch(as_trained)
                everywhere = gather_objects(mine)
                failed, report = self._together(lambda: self._compare(everywhere, reference))
                if failed is None and isinstance(report, AuditReport):
                    return report
            reason = failed
        return AuditReport(self.tolerance, not_audited=reason)

    def _reason_against(self) -> str | None:
        """Say why this step cannot be audited; every rank comes to the same answer."""
        mine = self.snapshot.cannot_restore
        if mine_anywhere := gather_objects(mine[:3]):
            found = next((names for names in mine_anywhere if names), None)
            if found:
                return (
                    f"{', '.join(found)} cannot be set back after it was read (an iterator, a "
                    "file), so the run would not go on as it was; keep it out of the module"
                )
        sizes = {len(window) for window in self.ranks}
        if len(sizes) > 1:
            return f"processes have {sorted(sizes)} micro-batches in this step, not equally many"
        try:
            self.micro_batches = self._joined_over_ranks()
        except ValueError as error:
            return str(error)
        return None if self.micro_batches else "no sample is in this step"

    def _joined_over_ranks(self) -> list[Any]:
        """Join the micro-batches that were trained on at the same time."""
        at_once = [[p for p in parts if rows_of(p)] for parts in zip(*self.ranks, strict=True)]
        joined = [join_rows(parts) for parts in at_once if parts]
        if joined:
            join_rows(joined)
        return joined

    def _reference(self) -> Gradient:
        """Choose the mode, and compute the gradient of all samples in one micro-batch."""
        whole = [join_rows(self.micro_batches)]
        draws = []
        for mode in ("training", "evaluation"):
            self.run.mode = mode
            gradient = self.run.gradient(whole)
            draws.append(self.snapshot.random_fingerprint())
            if mode == "training":
                in_training = gradient
        if draws[0] == draws[1]:
            self.run.mode, gradient = "training", in_training
        if not all(bool(part.isfinite().all()) for part in gradient):
            raise FloatingPointError("the gradient of the step is not finite")
        return gradient

    def _compare(self, trained: Sequence[tuple[float, Tensor]], reference: Gradient) -> AuditReport:
        """Compare the other cuts, and say what is the cause of differences.

        Args:
            trained: For each rank, how far its gradient is from the reference, and its sketch.
            reference: The gradient of all samples in one micro-batch and one process.
        """
        run, samples = self.run, [s for part in self.micro_batches for s in split_rows(part)]
        sizes = [rows_of(part) for part in self.micro_batches]
        whole = join_rows(samples)
        shuffled = samples[1::2] + samples[::2]
        columns = run.room_for_columns(whole)
        cuts: dict[str, Callable[[], Gradient]] = {
            "reversed": lambda: run.gradient(regroup(samples[::-1], sizes)),
            "repeated": lambda: run.gradient([join_rows(shuffled)], seed=1),
            "per_sample": lambda: run.gradient(samples),
            "padded": lambda: run.gradient([pad_rows(whole, columns)]),
        }
        differences, left_out = {"as_trained": max(difference for difference, _ in trained)}, None
        if columns == 0:
            del cuts["padded"]
            if width_of(whole) is not None:
                left_out = "padded (its rows are as long as a table of the module)"
        for name, gradient in cuts.items():
            try:
                differences[name] = relative_difference(gradient(), reference)
            except REFUSALS as error:
                left_out = f"{name} (the module says: {error})"
        causes, others = self._causes(differences, [of_rank for _, of_rank in trained])
        if self.view.was_left():
            raise ValueError(
                "the module communicates in a process group of its own, which it keeps where the "
                "audit cannot replace it; keep the group as an attribute of the module"
            )
        return AuditReport(self.tolerance, differences, causes, others, left_out=left_out)

    def _causes(
        self, differences: dict[str, float], trained: Sequence[Tensor]
    ) -> tuple[list[str], list[str]]:
        """Return the causes of what is wrong with this step, and of what would be in other cuts."""
        evidence = Evidence(self.run, self.micro_batches, self.tolerance)
        if not differences["repeated"] <= self.tolerance:
            return [gradient_causes.unrepeatable(evidence)], []
        causes: list[str | None] = []
        others: list[str] = []
        if not all(difference <= self.tolerance for difference in differences.values()):
            others = gradient_causes.of_cuts(evidence)
            in_one = evidence.sketch(self.micro_batches)
            if not differences["reversed"] <= self.tolerance or not evidence.same(
                in_one, evidence.reference
            ):
                causes, others = [*others], []
            causes += [cause for cause in others if cause in ALWAYS_WRONG]
            others = [cause for cause in others if cause not in ALWAYS_WRONG]
            # A mean of micro-batch means is one over processes, too.
            if MEAN_OF_MEANS not in causes and len(trained) > 1:
                causes.append(gradient_causes.of_ranks(evidence, in_one, trained, self.ranks))
        causes.append(gradient_causes.of_history(evidence, self.ranks))
        causes.append(gradient_causes.of_repetition(evidence))
        return [cause for cause in causes if cause is not None], others

    def _together(self, compute: Callable[[], Any]) -> tuple[str | None, Any]:
        """Compute in the surroundings of one process; return why it failed on a rank, and the result.

        The result is the first rank's where it is a report, so that all ranks act alike.
        """
        failed, result = None, None
        with self.view.entered():
            try:
                result = compute()
            except REFUSALS as error:
                failed = f"{type(error).__name__}: {error}"
        answers = gather_objects((failed, result if isinstance(result, AuditReport) else None))
        first = next((reason for reason, _ in answers if reason is not None), None)
        return first, answers[0][1] or result


def _in_half_precision(
    trainer: L.Trainer, module: L.LightningModule, window: Sequence[Any]
) -> bool:
    """Tell whether weights, data or the precision of the trainer are of 16 bits or fewer."""
    if str(trainer.precision).startswith(("16", "bf16", "transformer-engine")):
        return True
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    for batch in window:
        found += [tensor for _, tensor in tensors_of(batch)]
    return any(t.is_floating_point() and t.element_size() < 4 for t in found)
