"""Rollouts without an EOS, if only those with one are trained on."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.callbacks.rollouts.empty_windows import EmptyWindows
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama


class Saves(Callback):
    """Checkpoint after every optimizer step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        trainer.save_checkpoint(f"step{trainer.global_step}.ckpt")


def fit(truncated, steps, ckpt=None):
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=1), truncated=truncated, table_every=0
    )
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    fitted = trainer(max_steps=steps, max_epochs=-1, callbacks=[generation, Saves()])
    data = Letters(batch_size=1, rows=4)
    fitted.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return fitted


@pytest.fixture
def endless(monkeypatch):
    """Sampler that never samples EOS."""
    monkeypatch.setattr("lightning_kd.generation.sampler.is_end", lambda ids, _: ids != ids)
    monkeypatch.setattr("lightning_kd.generation.completions.is_end", lambda ids, _: ids != ids)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("truncated", ["drop", "mask"])
def test_empty_windows_are_a_warning_then_an_error(truncated):
    with pytest.warns(UserWarning, match=f"max_new_tokens 1, and truncated: {truncated}.*0 tokens"):
        fit(truncated, 2)
    with (
        pytest.warns(UserWarning, match="0 tokens were scored"),
        pytest.raises(
            ValueError, match=r"in 3 consecutive windows no completion ended .* truncated: keep"
        ),
    ):
        fit(truncated, 3)


@pytest.mark.usefixtures("endless")
def test_a_resumed_run_goes_on_counting():
    with pytest.warns(UserWarning, match="0 tokens were scored"):
        fit("mask", 2)
    with pytest.raises(ValueError, match="in 3 consecutive windows no completion ended"):
        fit("mask", 3, ckpt="step2.ckpt")


@pytest.mark.usefixtures("endless")
def test_kept_completions_are_trained_on():
    assert fit("keep", 4).callback_metrics["train/tokens"] > 0


class Ranks:
    """Module on two ranks, of which the other has scored some tokens."""

    device = torch.device("cpu")

    def __init__(self, others):
        self.others, self.asked = others, 0

    def sum_over_ranks(self, tensor):
        self.asked += 1
        return tensor + self.others


@pytest.mark.parametrize("labels", [[[IGNORE_INDEX]], [[3]], None])
def test_every_rank_takes_part_in_the_count(labels):
    batches = [] if labels is None else [{"labels": torch.tensor(labels)}]
    module, windows = Ranks(others=2), EmptyWindows("drop")
    for _ in range(5):
        windows.add(module, batches, 4)
    assert module.asked == 5


def test_a_window_with_tokens_resets_the_count():
    windows, empty = EmptyWindows("mask"), [{"labels": torch.tensor([[IGNORE_INDEX]])}]
    for _ in range(3):
        with pytest.warns(UserWarning, match="0 tokens were scored"):
            windows.add(Ranks(0), empty, 4)
        windows.add(Ranks(0), empty, 4)
        windows.add(Ranks(1), empty, 4)
