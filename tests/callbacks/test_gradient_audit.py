"""Modules that are right, modules that are wrong on purpose, and a run that must not notice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.models import ModelSource, SingleTeacher, Student, TeacherEnsemble
from lightning_kd.modules import SFT, BabyLlama, SequenceKD, SupervisedKD
from lightning_kd.normalization import ConstantLength
from tests.modules.harness import BatchList, trainer
from tests.toys import ragged_batch, tiny_llama

BATCHES = [
    ragged_batch([(2, 5), (1, 3)], seed=1),
    ragged_batch([(6, 1), (1, 2)], seed=2),
    ragged_batch([(1, 9), (3, 4)], seed=3),
]
CUTS = {"as_trained", "per_sample", "reversed", "padded"}


class Plain(L.LightningModule):
    """A user's own module: a causal model and the mean loss of transformers' kind."""

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
    UnscoredText: "denominator of unscored text",
    CountsPadding: "denominator of unscored text",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_each_fault_is_found_and_named(fault):
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

    teacher = SingleTeacher.of(llama(1))
    two = TeacherEnsemble([ModelSource.of(llama(1)), ModelSource.of(llama(2))])
    for normalization in ("token", "sequence", "batch", ConstantLength(12)):

        def build(method, n=normalization, **settings):
            return lambda: method(student=Student.of(llama(0)), normalization=n, **settings)

        yield build(SFT)
        yield build(SequenceKD, teacher=teacher)
        yield build(SupervisedKD, teacher=teacher, temperature=2.0)
        # The official scale needs the counts of a whole step, which tokens of one window do not tell.
        for scale in ("token",) if normalization == "token" else ("token", "batchmean"):
            yield build(BabyLlama, teacher=two, kl_scale=scale)


@pytest.mark.parametrize("build", list(methods()))
def test_every_method_of_ours_is_the_same_in_every_cut(build):
    """In float64; what is left is the rounding of a Llama's norms, which keep float32 inside."""
    differences = audit(build(), precision="64-true", on_fault="raise", tolerance=1e-6)
    assert set(differences) == CUTS
    assert max(differences.values()) < 1e-6


class Trace(L.Callback):
    """All that an audit might disturb, after every micro-batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        moments = [
            value.flatten()
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
        ]
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        logs = {k: v.item() for k, v in trainer.callback_metrics.items() if "audit" not in k}
        self.seen.append(
            (
                weights.clone(),
                torch.cat(moments) if moments else torch.zeros(0),
                torch.cat(gradients).clone() if gradients else torch.zeros(0),
                torch.get_rng_state(),
                torch.tensor(np.random.get_state()[1].astype(np.int64)),
                random.getstate(),
                logs,
                getattr(pl_module, "steps", None),
                [m.training for m in pl_module.modules()],
            )
        )


@pytest.mark.filterwarnings("ignore:the gradient of step")
@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_an_audited_run_is_bit_for_bit_an_unaudited_one(kind):
    def run(audit):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if kind == "plain":
            module = MeanOfMeans()
        else:
            module = SupervisedKD(
                student=Student.of(tiny_llama(0, attention_dropout=0.3)),
                teacher=SingleTeacher.of(tiny_llama(1)),
            )
        trace = Trace()
        callbacks = [LossNormalizationDiagnostics(audit=audit), trace]
        fit = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=callbacks)
        fit.fit(module, datamodule=BatchList(BATCHES * 2))
        return trace.seen

    for audited, plain in zip(run(1), run("never"), strict=True):
        for a, b in zip(audited, plain, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_wrong_values_are_refused():
    for arguments in ({"audit": 0}, {"audit": "always"}, {"tolerance": 0}, {"on_fault": "stop"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LossNormalizationDiagnostics(**arguments)


TWO_RANKS = """
import sys, warnings, torch, lightning as L
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from tests.callbacks.test_gradient_audit import *

class OneOverWorld(Plain):
    def reduce(self, losses, batch):
        count = self.scored(batch).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
        return losses.sum() / count

def main():
    own = BATCHES[int(__import__("os").environ.get("LOCAL_RANK", 0))::2]
    module = {
        "fault": OneOverWorld,
        "ours": lambda: SupervisedKD(
            student=Student.of(tiny_llama(0)), teacher=SingleTeacher.of(tiny_llama(1))
        ),
    }[sys.argv[2]]()
    callback = LossNormalizationDiagnostics(audit="first", on_fault="raise", tolerance=1e-5)
    # One micro-batch for each rank: the fault does not depend on accumulation.
    fit = trainer(max_steps=1, devices=2, strategy="ddp", callbacks=[callback])
    fit.fit(module, datamodule=BatchList(own[:1]))
    if fit.is_global_zero:
        print("LARGEST", max(v.item() for k, v in fit.callback_metrics.items() if "audit" in k))

main()
"""


@pytest.mark.parametrize("kind", ["fault", "ours"])
def test_two_ranks(kind, tmp_path):
    (tmp_path / "run.py").write_text(TWO_RANKS)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "run.py", root, kind],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    if kind == "fault":
        assert done.returncode != 0
        assert "1/world_size" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split("LARGEST")[1]) < 2e-6
