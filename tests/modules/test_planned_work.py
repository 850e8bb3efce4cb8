"""How many logits a run is going to evaluate, which decides about compiling on a CPU."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.utils import counters

from lightning_kd.fused import compilation, compile_choice
from lightning_kd.models import FusedLogits, StudentSpec
from lightning_kd.modules import SFT
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCHES = [ragged_batch([(2, 9), (1, 7)], seed=1), ragged_batch([(4, 1)], seed=2)] * 4


class Recording(FusedLogits):
    """Remembers what it hears."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def plan(self, logits):
        self.heard.append(logits)
        super().plan(logits)


def module(**options):
    options = {"logits_backend": Recording()} | options
    return SFT(student=StudentSpec.of(tiny_llama(0)), **options)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 4}, 4),
    ],
)
def test_of_all_steps_as_far_as_the_first_micro_batch_tells(limits, steps):
    sft = module()
    trainer(**limits).fit(sft, datamodule=BatchList(BATCHES))
    # 16 labels in the first micro-batch, 18 tokens.
    expected = steps * limits["accumulate_grad_batches"] * 16 * 18
    assert sft.logits_backend.heard == [0.0, expected]


def test_ranks_that_have_more_positions_count(monkeypatch):
    sft = module()
    monkeypatch.setattr(sft, "sum_over_ranks", lambda tensor: tensor + 4)
    fit = trainer(max_steps=1)
    fit.fit(sft, datamodule=BatchList(BATCHES[:1]))
    assert sft.logits_backend.heard == [0.0, (16 + 4) * 18]


@pytest.mark.slow
def test_nothing_is_known_of_a_run_that_only_time_ends():
    sft = module()
    trainer(max_time="00:00:00:01", max_steps=-1, max_epochs=-1).fit(
        sft, datamodule=BatchList(BATCHES)
    )
    assert sft.logits_backend.heard == [0.0, 0.0]


def test_a_resumed_run_hears_what_the_saved_one_heard(tmp_path):
    steps = {"max_steps": 4, "max_epochs": -1}
    modules = module(), module()
    saved = tmp_path / "0" / "epoch=0-step=1.ckpt"
    for number, (sft, path) in enumerate(zip(modules, (None, saved), strict=True)):
        saving = ModelCheckpoint(tmp_path / str(number), every_n_train_steps=1, save_top_k=-1)
        fit = trainer(**steps, callbacks=[saving], enable_checkpointing=True)
        fit.fit(sft, datamodule=BatchList(BATCHES), ckpt_path=path, weights_only=True)
    resumed = modules[1]
    again = resumed.logits_backend.heard
    # Its own first micro-batch, the second of the data, has 1 label.
    assert again == [4 * 16 * 18]
    trainer(max_steps=1).fit(resumed, datamodule=BatchList(BATCHES[1:2]))
    assert again[1:] == [0.0, 18]  # another run has a plan of its own


@pytest.mark.slow
@pytest.mark.parametrize(("from_", "is_compiled"), [(4 * 16 * 18, True), (4 * 16 * 18 + 1, False)])
def test_auto_compiles_on_a_cpu_where_the_plan_is_large(from_, is_compiled, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compile_choice, "PAYS_FROM", from_)
    torch._dynamo.reset()
    counters.clear()
    compilation._compiled.cache_clear()
    losses = []
    for backend in (FusedLogits(), FusedLogits(compile="never")):
        fit = trainer(max_steps=4, max_epochs=-1)
        sft = module(logits_backend=backend)
        fit.fit(sft, datamodule=BatchList(BATCHES))
        losses.append(fit.callback_metrics["train/loss"].item())
    assert (counters["stats"]["unique_graphs"] > 0) == is_compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
