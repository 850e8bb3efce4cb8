"""Report of a gradient audit."""

from dataclasses import dataclass, field

from lightning_kd.callbacks.audit.cause_texts import DIVIDED_BY_COUNT_TWICE, STALE_COUNT, UNSCORED

ALWAYS_WRONG = {UNSCORED, STALE_COUNT, DIVIDED_BY_COUNT_TWICE}
"""Causes that make a gradient wrong in every partitioning."""


@dataclass(frozen=True)
class AuditReport:
    """Differences between the gradients of partitionings, and their causes.

    The reference is the gradient of all samples in one micro-batch.
    """

    tolerance: float
    differences: dict[str, float] = field(default_factory=dict)
    """Relative difference of each partitioning: norm of the difference over norm of the reference."""
    causes: list[str] = field(default_factory=list)
    """Causes that were identified; empty if nothing is wrong or no cause is recognized."""
    other_causes: list[str] = field(default_factory=list)
    """Causes of differences in other partitionings than that of the step: single samples."""
    not_audited: str | None = None
    """Reason that there was no audit, if there was none."""
    skipped: str | None = None
    """Partitioning that was not compared, and the reason."""
    changed_weights: list[str] = field(default_factory=list)
    """Weights of unregistered models that the training step changes in place, so that the audit has
    changed them."""

    @property
    def is_fault(self) -> bool:
        """Whether the gradient of the step is wrong, or would be with its rows in another order.

        A difference of single samples alone is no fault: the gradient was correct as trained.
        """
        wrong = [d for name, d in self.differences.items() if name != "per_sample"]
        return any(not difference <= self.tolerance for difference in wrong) or bool(
            ALWAYS_WRONG & {*self.causes}
        )

    @property
    def depends_on_partitioning(self) -> bool:
        """Whether any partitioning differs."""
        return not all(d <= self.tolerance for d in self.differences.values())

    def message(self, step: int) -> str:
        """Return one or two sentences on what was found in an optimizer step."""
        if self.not_audited:
            return f"the gradient of step {step} was not audited: {self.not_audited}"
        found = {name: f"{difference:.2g}" for name, difference in self.differences.items()}
        differences = f"relative differences of the gradient in other partitionings: {found}"
        if self.is_fault:
            causes = "; ".join(self.causes) or "unknown"
            text = f"the gradient of step {step} depends on more than its samples. Cause: {causes}"
        elif self.depends_on_partitioning:
            others = "; ".join(self.other_causes) or "unknown"
            text = (
                f"the gradient of step {step} is correct as trained, but would differ in other "
                f"micro-batches. Cause: {others}"
            )
        else:
            text = f"the gradient of step {step} is the same in every partitioning"
        text = f"{text} ({differences})"
        if self.skipped:
            text += f". Not compared: {self.skipped}"
        if self.changed_weights:
            text += (
                f". The audit changed weights of a model that the module does not register "
                f"({', '.join(self.changed_weights[:3])}); register it, or turn the audit off"
            )
        return text
