"""Audits of modules with planted faults and of correct ones, and runs that they do not change."""

from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT, BabyLlama, SequenceKD, SupervisedKD
from lightning_kd.normalization import ConstantLength
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.benchmarks.audit_table import HEADINGS, row_of
from tests.callbacks.audit.audit_runs import (
    Outcome,
    audit_two_processes,
    trace,
)
from tests.callbacks.audit.audit_runs import (
    audit as audit_case,
)
from tests.callbacks.audit.audited_modules import (
    CORRECT,
    PLANTED,
    Base,
    Case,
    Everything,
    ReadsAnIterator,
    SummedInOneProcess,
)
from tests.callbacks.audit.audited_modules import (
    MeanOfMeans as TokenMean,
)
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCHES = [
    ragged_batch([(2, 5), (1, 3)], seed=1),
    ragged_batch([(6, 1), (1, 2)], seed=2),
    ragged_batch([(1, 9), (3, 4)], seed=3),
]
PARTITIONINGS = {"as_trained", "per_sample", "reversed", "padded", "repeated"}


class Plain(L.LightningModule):
    """A user's own module: a causal model and a mean loss as in transformers."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama(0)
        self.steps = 0

    def token_losses(self, batch):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )

    def scored(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()

    def training_step(self, batch, batch_idx):
        self.steps += 1
        loss = self.reduce(self.token_losses(batch), batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        raise AssertionError("nothing is validated here")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class MeanOfMeans(Plain):
    def reduce(self, losses, batch):
        return losses.sum() / self.scored(batch)


class DividedTwice(MeanOfMeans):
    def reduce(self, losses, batch):
        return super().reduce(losses, batch) / self.trainer.accumulate_grad_batches


class NeverDivided(MeanOfMeans):
    def reduce(self, losses, batch):
        return super().reduce(losses, batch) * self.trainer.accumulate_grad_batches


class UnscoredText(Plain):
    def reduce(self, losses, batch):
        return losses.sum() / batch["attention_mask"].sum()


class CountsPadding(Plain):
    def reduce(self, losses, batch):
        return losses.mean()


def audit(module, precision="32-true", **settings):
    batches = BATCHES
    callback = LossNormalizationDiagnostics(histograms_every=0, audit="first", **settings)
    fit = trainer(
        max_steps=1,
        accumulate_grad_batches=len(batches),
        callbacks=[callback],
        precision=precision,
    )
    fit.fit(module, datamodule=BatchList(batches))
    prefix = "norm/audit/"
    return {
        k.removeprefix(prefix): v.item()
        for k, v in fit.callback_metrics.items()
        if k.startswith(prefix)
    }


FAULTS = {
    MeanOfMeans: "mean of micro-batch means",
    DividedTwice: "divided twice",
    NeverDivided: "never divided",
    UnscoredText: "unscored tokens in the denominator",
    CountsPadding: "unscored tokens in the denominator",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_each_fault_is_detected_with_its_cause(fault):
    with pytest.raises(ValueError, match=FAULTS[fault]) as found:
        audit(fault(), on_fault="raise")
    others = {cause for cls, cause in FAULTS.items() if cause != FAULTS[fault]}
    if fault is not CountsPadding and fault is not UnscoredText:
        assert not any(cause in str(found.value) for cause in others)
    with pytest.warns(UserWarning, match=FAULTS[fault]):
        audit(fault())


def methods():
    def llama(seed):
        return tiny_llama(seed).double()

    teacher = LocalTeacher.of(llama(1))
    two = TeacherEnsemble([LocalTeacher.of(llama(1)), LocalTeacher.of(llama(2))])
    for normalization in ("token", "sequence", "batch", ConstantLength(12)):

        def build(method, n=normalization, **settings):
            return lambda: method(student=StudentSpec.of(llama(0)), normalization=n, **settings)

        yield build(SFT)
        yield build(SequenceKD, teacher=teacher)
        yield build(SupervisedKD, teacher=teacher, temperature=2.0)
        # The official scale needs the counts of a whole step, which tokens of one window do not tell.
        for scale in ("token",) if normalization == "token" else ("token", "batchmean"):
            yield build(BabyLlama, teacher=two, kl_scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("build", list(methods()))
def test_the_gradient_of_every_method_is_the_same_in_every_partitioning(build):
    """In float64, differences are rounding in the norms of a Llama, which compute in float32."""
    differences = audit(build(), precision="64-true", on_fault="raise", tolerance=1e-6)
    assert set(differences) == PARTITIONINGS
    assert max(differences.values()) < 1e-6


# Planted faults and correct modules: the table of docs/normalization.md.

DOCS = Path(__file__).resolve().parents[3] / "docs" / "normalization.md"
ONE_PROCESS = [case for case in [*PLANTED, *CORRECT] if case.processes == 1]
TWO_PROCESSES = [case for case in [*PLANTED, *CORRECT] if case.processes == 2]


@pytest.fixture(scope="module")
def two_processes():
    return audit_two_processes()


def check(case, outcome):
    warned = "; ".join(outcome.warnings)
    if case.cause is None:
        assert not warned
        assert bool(outcome.notes) == case.note
        assert max(outcome.differences["as_trained"], 0) < 1e-5 or case.name.startswith("float16")
    else:
        assert case.cause in warned
        assert len(outcome.causes) == case.causes  # and no other
    assert row_of(case, outcome) in DOCS.read_text()


def test_the_table_has_enough_cases():
    assert len(PLANTED) >= 12
    assert len(CORRECT) >= 12
    assert HEADINGS in DOCS.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_PROCESS, ids=lambda case: case.name)
def test_in_one_process(case):
    check(case, audit_case(case))


@pytest.mark.parametrize("case", TWO_PROCESSES, ids=lambda case: case.name)
def test_in_two_processes(case, two_processes):
    first, second = (Outcome(**found) for found in two_processes[case.name])
    check(case, first)
    assert first.causes == second.causes


def test_a_gradient_that_is_correct_as_trained_is_reported_so():
    (case,) = [case for case in CORRECT if "one micro-batch, one process" in case.name]
    outcome = audit_case(case)
    assert outcome.differences["as_trained"] == 0
    assert outcome.differences["per_sample"] > 0.01
    assert "is correct as trained, but would differ in other micro-batches" in outcome.notes
    assert "mean of micro-batch means" in outcome.notes


def test_no_unscored_tokens_are_reported_if_all_have_labels():
    """Attention mask and labels agree, so that either count is the same: one cause, not two."""

    class Attended(Base):
        def reduce(self, losses, batch):
            return losses.sum() / batch["attention_mask"].sum()

    every = [ragged_batch([(0, 5), (0, 3)], seed=1), ragged_batch([(0, 9), (0, 2)], seed=2)]
    outcome = audit_case(Case("", Attended, batches=every, accumulate=2))
    assert [cause.split(":")[0] for cause in outcome.causes] == ["mean of micro-batch means"]


def test_sparse_gradients_are_compared_like_others():
    class Sparse(TokenMean):
        def __init__(self):
            super().__init__()
            self.embedding.sparse = True

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    dense = audit_case(Case("", TokenMean)).differences
    assert dense["as_trained"] > 0.01
    assert audit_case(Case("", Sparse)).differences == pytest.approx(dense, rel=1e-3, abs=1e-6)


def test_the_gradient_is_that_of_the_step_where_it_is_cleared_behind_it():
    class ClearsGradients(TokenMean):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            optimizer.zero_grad(set_to_none=False)

    kept, cleared = (audit_case(Case("", module)) for module in (TokenMean, ClearsGradients))
    assert cleared.differences == kept.differences
    assert cleared.causes == kept.causes != []


def test_all_processes_raise_the_same_error(two_processes):
    first, second = two_processes["raised"]
    assert "1/world_size" in first
    assert first == second


def test_every_process_gathers_the_objects_of_all(two_processes):
    of_all = [{"rank": 0, "prompt": ""}, {"rank": 1, "prompt": "x"}]
    assert two_processes["gathered"] == [of_all, of_all]


@pytest.mark.parametrize("rows", ["rows of 2 and 0", "rows of 2 and 1"])
def test_a_process_may_have_fewer_rows_or_none(two_processes, rows):
    for report in two_processes[rows]:
        assert report["not_audited"] is None
        assert not report["is_fault"]
        assert max(report["differences"].values()) < 1e-5


def test_steps_that_cannot_be_audited_are_reported(two_processes):
    for report in two_processes["windows of 1 and 0"]:
        assert "processes have [0, 1] micro-batches" in report["not_audited"]
    for report in two_processes["rows of 0 and 0"]:
        assert "the step has no samples" in report["not_audited"]


# An audit does not change the run.


def test_two_audited_processes_train_bit_for_bit_as_without_an_audit(two_processes):
    assert len(two_processes["trace audited True"][0]) == 12
    assert two_processes["trace audited True"] == two_processes["trace audited False"]
    assert two_processes["trace audited True"][0] != two_processes["trace audited True"][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["everything", "token mean", "llama", "ours"])
def test_an_audited_run_is_bit_for_bit_the_same_as_without_an_audit(kind):
    build = {
        "everything": Everything,
        "token mean": TokenMean,
        "llama": MeanOfMeans,
        "ours": lambda: SupervisedKD(
            student=StudentSpec.of(tiny_llama(0, attention_dropout=0.3)),
            teacher=LocalTeacher.of(tiny_llama(1)),
        ),
    }[kind]

    plain = trace(False, build())
    assert len(set(plain)) > 6
    assert trace(True, build()) == plain


def test_a_module_whose_state_cannot_be_restored_is_not_audited():
    seen = []
    for when in ("first", "never"):
        module = ReadsAnIterator()
        callback = LossNormalizationDiagnostics(histograms_every=0, audit=when)
        fit = trainer(max_steps=1, callbacks=[callback])
        with pytest.warns(UserWarning, match="was not audited: ReadsAnIterator.noise|logs nothing"):
            fit.fit(module, datamodule=BatchList(BATCHES))
        seen.append([next(module.noise), *(p.tolist() for p in module.parameters())])
    assert seen[0] == seen[1]


def test_changed_weights_of_an_unregistered_model_are_reported():
    class ChangesItsTeacher(SummedInOneProcess):
        def __init__(self):
            super().__init__()
            self.held = [torch.nn.Linear(2, 2)]

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.held[0].weight.add_(1)
            return super().training_step(batch, batch_idx)

    outcome = audit_case(Case("", ChangesItsTeacher))
    assert "changed weights of a model that the module does not register" in outcome.warnings[0]
    assert "held[0]" in outcome.warnings[0]


# Settings.


def test_invalid_values_are_rejected():
    wrong = ({"audit": 0}, {"audit": True}, {"audit": "always"}, {"tolerance": 0})
    for arguments in (*wrong, {"on_fault": "stop"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LossNormalizationDiagnostics(**arguments)


def test_a_module_with_nothing_to_log_gets_one_warning():
    callback = LossNormalizationDiagnostics()
    fit = trainer(max_steps=2, callbacks=[callback])
    with pytest.warns(UserWarning, match="logs nothing under norm/ for MeanOfMeans.*Set audit"):
        fit.fit(TokenMean(), datamodule=BatchList(BATCHES))
    assert not any(name.startswith("norm/") for name in fit.callback_metrics)


def test_a_gradient_with_an_infinite_element_is_not_compared():
    class Infinite(SummedInOneProcess):
        def on_fit_start(self):
            self.embedding.weight.register_hook(
                lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.inf)
            )

    outcome = audit_case(Case("", Infinite))
    assert "the gradient of the step is not finite" in outcome.warnings[0]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-true", 0.05)])
def test_the_default_tolerance_is_larger_in_half_precision(precision, tolerance):
    callback = LossNormalizationDiagnostics(histograms_every=0, audit="first", on_fault="raise")
    fit = trainer(max_steps=1, callbacks=[callback], precision=precision)
    fit.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=BatchList(BATCHES))
    assert callback.audit.report.tolerance == tolerance
    rounded = max(callback.audit.report.differences.values()) > 1e-4
    assert rounded == (precision != "32-true")
