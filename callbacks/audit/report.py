"""What an audit of gradients found, and how it is said."""

from dataclasses import dataclass, field

from lightning_kd.callbacks.audit.cause_texts import COUNTED_TWICE, STALE_COUNT, UNSCORED

ALWAYS_WRONG = {UNSCORED, STALE_COUNT, COUNTED_TWICE}
"""Causes that make a gradient wrong however its samples are cut."""


@dataclass(frozen=True)
class AuditReport:
    """How far the gradients of other cuts are from that of all samples in one micro-batch."""

    tolerance: float
    differences: dict[str, float] = field(default_factory=dict)
    """Relative difference of each cut: norm of the difference over norm of the gradient."""
    causes: list[str] = field(default_factory=list)
    """What the evidence singles out as the reason; empty where nothing is wrong or recognized."""
    in_other_cuts: list[str] = field(default_factory=list)
    """The same for cuts that this step has not: single samples."""
    not_audited: str | None = None
    """Why there is nothing to report, where there is not."""
    left_out: str | None = None
    """Why a cut is missing, where one is."""
    disturbed: list[str] = field(default_factory=list)
    """Weights of models that are not registered which the training step changes in place, so that
    the run does not go on as it was."""

    @property
    def is_fault(self) -> bool:
        """Whether the gradient of the step is wrong, or would be with the rows in another order.

        A difference of single samples alone is none: as it was trained, the gradient was right.
        """
        wrong = [d for cut, d in self.differences.items() if cut != "per_sample"]
        return any(not difference <= self.tolerance for difference in wrong) or bool(
            ALWAYS_WRONG & {*self.causes}
        )

    @property
    def depends_on_cut(self) -> bool:
        """Whether any cut differs."""
        return not all(d <= self.tolerance for d in self.differences.values())

    def message(self, step: int) -> str:
        """Say in a sentence or two what was found in an optimizer step."""
        if self.not_audited:
            return f"the gradient of step {step} was not audited: {self.not_audited}"
        found = {cut: f"{difference:.2g}" for cut, difference in self.differences.items()}
        differences = f"relative differences of the gradient in other cuts: {found}"
        if self.is_fault:
            causes = "; ".join(self.causes) or "none that the evidence singles out"
            said = f"the gradient of step {step} depends on more than its samples. Cause: {causes}"
        elif self.depends_on_cut:
            others = "; ".join(self.in_other_cuts) or "none that the evidence singles out"
            said = (
                f"the gradient of step {step} is right as it was trained, and would differ in other "
                f"micro-batches. Cause: {others}"
            )
        else:
            said = f"the gradient of step {step} is the same in every cut"
        said = f"{said} ({differences})"
        if self.left_out:
            said += f". Not compared: {self.left_out}"
        if self.disturbed:
            said += (
                f". The audit changed weights of a model that the module does not register "
                f"({', '.join(self.disturbed[:3])}); register it, or do not audit this module"
            )
        return said
