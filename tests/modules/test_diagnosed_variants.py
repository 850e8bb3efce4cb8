"""The diagnostics of a loss's normalization, of every variant of a method: counts and audits."""

import math

import pytest
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics
from tests.modules.partition_grid import (
    GENERATING,
    ON_POLICY_VARIANTS,
    STEPS,
    VARIANTS,
    Steps,
    build,
    fitted,
    writing,
)

CUT = (1, 2, 4)
CUTS_OF_THE_AUDIT = {"as_trained", "per_sample", "reversed", "padded", "repeated"}
SHARE = {"uncertain": 0.4, "uncertain_gkd": 0.4}
"""The share of a row's positions that takes part, 1 of other methods."""


class Scored(Steps):
    """Labels of each step's rows, and what is logged of the step."""

    def __init__(self):
        super().__init__()
        self.rows, self.lengths, self.logged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.rows += (batch["labels"][:, 1:] != -100).sum(-1).tolist()
        if trainer.global_step > self.before:
            self.lengths.append([count for count in self.rows if count])
            self.rows = []
            logged = trainer.callback_metrics.items()
            self.logged.append({name: value.item() for name, value in logged})


def run(method, *callbacks):
    """Record the steps of a run, and its losses."""
    steps = Scored()
    writes = [writing(method)] if method in GENERATING else []
    _, losses = fitted(
        build(method, "sequence"),
        method,
        CUT,
        0,
        precision="64-true",
        log_every_n_steps=1,
        callbacks=[*writes, *callbacks, steps],
    )
    return steps, losses


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("method", [*VARIANTS, *ON_POLICY_VARIANTS, "sdft", "opsd", "frozen"])
def test_counts_are_those_of_the_rows_and_an_audit_finds_and_changes_nothing(method):
    audit = LossNormalizationDiagnostics(audit=1, on_fault="raise", tolerance=1e-9)
    audited, _ = run(method, audit)
    plain, _ = run(method)
    assert audit.audit.report.differences.keys() == CUTS_OF_THE_AUDIT
    assert len(audited.gradients) == STEPS.get(method, 2)
    for logged, lengths in zip(audited.logged, audited.lengths, strict=True):
        taking_part = [math.ceil(length * SHARE.get(method, 1)) for length in lengths]
        assert logged["norm/tokens"] == logged["train/tokens"] == sum(taking_part)
        assert logged["norm/count"] == logged["norm/sequences"] == len(lengths)
        assert logged["norm/loss_sequence"] == pytest.approx(logged["train/loss"], rel=1e-6)
        assert logged["norm/terms_agree"] == 1
    # What moves with a step (a target, an average, a buffer, a share) has not moved with its audit.
    assert plain.lengths == audited.lengths
    for own, expected in zip(audited.gradients, plain.gradients, strict=True):
        assert torch.equal(own, expected)
