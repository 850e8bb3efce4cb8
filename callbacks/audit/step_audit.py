"""Schedule of audits, and reporting of their results."""

import functools
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_kd.callbacks.audit.batch_recorder import BatchRecorder
from lightning_kd.callbacks.audit.gradient_audit import audit_window
from lightning_kd.callbacks.audit.replay import takes_batches
from lightning_kd.callbacks.audit.report import AuditReport
from lightning_kd.callbacks.metric_logging import log_metrics
from lightning_kd.models.sharding import is_sharded
from lightning_kd.strategies import adapter_of


class StepAudit:
    """Audit of the steps that are due: records their batches, replays them, and reports.

    Args:
        when: ``never``, ``first`` (the first step of the run) or a number of optimizer steps.
        tolerance: Relative difference of gradients above which a step is at fault. Defaults to a
            value for the precision of the run.
        on_fault: ``warn`` or ``raise``.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        when: Literal["never", "first"] | int,
        tolerance: float | None,
        on_fault: Literal["warn", "raise"],
    ) -> None:
        steps = isinstance(when, int) and not isinstance(when, bool) and when > 0
        if when not in {"never", "first"} and not steps:
            raise ValueError(
                f"audit is {when!r}; give never, first, or a number of steps, 1 or more"
            )
        if on_fault not in {"warn", "raise"}:
            raise ValueError(f"on_fault is {on_fault!r}; choose one of warn, raise")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance}; it must be positive")
        self.when, self.tolerance, self.on_fault = when, tolerance, on_fault
        self.report: AuditReport | None = None
        """Report of the last audit."""
        self._recorder = BatchRecorder()

    def check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate that the gradients of this run can be audited.

        Raises:
            ValueError: If gradients are sharded or not accessible, or optimization is manual.
        """
        self.stop()
        self._recorder.take()
        if adapter_of(trainer).scales_loss_before_backward or any(
            is_sharded(part) for part in module.modules()
        ):
            raise ValueError(
                f"audit is {self.when!r}, but this strategy shards gradients, so that no process can "
                "compute another partitioning by itself; audit with ddp or one process"
            )
        if not module.automatic_optimization or not takes_batches(module):
            raise ValueError(
                f"audit is {self.when!r}, but {type(module).__name__} steps the optimizer or reads "
                "its loader itself, so its step cannot be replayed in other partitionings; audit a "
                "module with automatic optimization and training_step(batch, batch_idx), or set "
                "audit: never"
            )

    def before_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Record the next batch if its step is due for an audit."""
        if self._is_due(trainer.global_step + 1):
            self._recorder.start(module)

    def after_batch(
        self, trainer: L.Trainer, module: L.LightningModule, stepped: bool, *ended: Any
    ) -> None:
        """Audit the step that was just taken, if it is due.

        Args:
            trainer: The trainer.
            module: Its module.
            stepped: Whether the optimizer has stepped.
            ended: Arguments of the module's ``on_train_batch_end``, which is called later.

        Raises:
            ValueError: If a fault is found, or the step cannot be audited, and ``on_fault`` is
                ``raise``.
        """
        self.stop()
        step = trainer.global_step
        if not stepped or not self._is_due(step):
            return
        # Lightning calls this hook of the module after those of callbacks; it may reset counts.
        has_hook = type(module).on_train_batch_end is not L.LightningModule.on_train_batch_end
        finish = functools.partial(module.on_train_batch_end, *ended) if has_hook else None
        report = audit_window(trainer, module, self._recorder.take(), self.tolerance, finish)
        self.report = report
        if report.differences:
            numbers = {f"norm/audit/{c}": torch.tensor(d) for c, d in report.differences.items()}
            log_metrics(trainer, numbers, step - 1)
        if report.is_fault or report.not_audited or report.changed_weights:
            if self.on_fault == "raise":
                raise ValueError(report.message(step))
            rank_zero_warn(report.message(step))
        elif report.depends_on_partitioning or report.skipped:
            rank_zero_info(report.message(step))

    def stop(self) -> None:
        """Stop recording."""
        self._recorder.stop()

    def _is_due(self, step: int) -> bool:
        if isinstance(self.when, int):
            return step % self.when == 0
        return self.when == "first" and self.report is None
