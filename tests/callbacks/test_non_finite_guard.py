import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_kd.callbacks import NonFiniteGuard, OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SFT
from lightning_kd.teachers import LiveStudent
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCHES = [ragged_batch([(2, 5), (1, 3)], seed) for seed in range(8)]


class Poison(Callback):
    """Non-finite gradient in one micro-batch, or in all from one on."""

    def __init__(self, *poisoned, value=float("nan")):
        self.poisoned, self.value = poisoned, value
        self.weights = []

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.batch_idx in self.poisoned:
            next(pl_module.parameters()).grad[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        state = trainer.optimizers[0].state
        moments = [v["exp_avg"].flatten() for v in state.values()]
        self.weights.append(torch.cat([weights, *moments]).clone())


def fit(guard, poison, **settings):
    module = SFT(
        student=StudentSpec.of(tiny_llama(0)),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    )
    run = trainer(callbacks=[guard, poison], **settings)
    run.fit(module, datamodule=BatchList(BATCHES))
    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:optimizer step 2 was skipped")
def test_a_step_with_a_non_finite_gradient_changes_nothing(tmp_path, value):
    poison = Poison(2, value=value)
    guard = NonFiniteGuard("skip", dirpath=str(tmp_path / "bad"))
    run = fit(guard, poison, accumulate_grad_batches=2)
    assert run.global_step == 4
    before, after = poison.weights[2], poison.weights[3]
    assert torch.equal(before, after)
    assert not torch.equal(poison.weights[1], poison.weights[0])
    assert not torch.equal(poison.weights[5], after)
    assert poison.weights[-1].isfinite().all()
    assert run.callback_metrics["train/skipped_steps"] == guard.state_dict()["skipped"] == 1
    # Both micro-batches of the step are there to be looked at.
    for number in (0, 1):
        saved = load_file(tmp_path / "bad" / f"step2_rank0_batch{number}.safetensors")
        assert torch.equal(saved["input_ids"], BATCHES[2 + number]["input_ids"])


def test_a_run_is_stopped_with_the_weights_of_the_previous_step(tmp_path):
    poison = Poison(3)
    with pytest.raises(ValueError, match="gradient of optimizer step 4 is not finite; its batches"):
        fit(NonFiniteGuard(dirpath=str(tmp_path)), poison)
    assert len(poison.weights) == 3
    assert (tmp_path / "step4_rank0_batch0.safetensors").exists()


def test_what_the_teacher_reads_is_saved_with_the_generated_completions(tmp_path):
    """What a self-taught student has gone wrong on stands in no other column."""

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

    keep = Keep()
    writes = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=4), table_every=0)
    callbacks = [NonFiniteGuard(dirpath=str(tmp_path)), writes, keep, Poison(0)]
    run = trainer(max_steps=1, max_epochs=-1, callbacks=callbacks)
    with pytest.raises(ValueError, match="gradient of optimizer step 1 is not finite"):
        run.fit(GKD(student=tiny_llama(0), teacher=LiveStudent()), datamodule=Letters(told=True))
    saved = load_file(tmp_path / "step1_rank0_batch0.safetensors")
    assert torch.equal(saved["completion_mask"], keep.batch["completion_mask"])
    for name in ("input_ids", "attention_mask", "prompt_ids", "prompt_mask"):
        assert torch.equal(saved[f"teacher.{name}"], keep.batch["teacher"][name])
    assert not torch.equal(saved["teacher.prompt_ids"], saved["prompt_ids"])


def test_the_text_of_a_second_stream_is_saved(tmp_path):
    texts = [ragged_batch([(0, 6), (0, 6)], seed) for seed in (8, 9)]
    both = [batch | {"text": text} for batch, text in zip(BATCHES, texts, strict=False)]
    run = trainer(callbacks=[NonFiniteGuard(dirpath=str(tmp_path)), Poison(1)])
    with pytest.raises(ValueError, match="gradient of optimizer step 2 is not finite"):
        run.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=BatchList(both))
    saved = load_file(tmp_path / "step2_rank0_batch0.safetensors")
    assert torch.equal(saved["text.input_ids"], texts[1]["input_ids"])


@pytest.mark.filterwarnings("ignore:optimizer step . was skipped")
def test_a_run_that_does_not_recover_is_stopped(tmp_path):
    with pytest.raises(ValueError, match="optimizer step 6 is not finite"):
        fit(NonFiniteGuard("skip", max_skips=2, dirpath=str(tmp_path)), Poison(1, 3, 4, 5, 6))


def test_the_count_of_skipped_steps_continues_after_a_resume():
    guard = NonFiniteGuard("skip")
    guard.load_state_dict({"skipped": 3})
    assert guard.state_dict() == {"skipped": 3}


@pytest.mark.parametrize(
    ("values", "said"), [(("leave",), "stop"), (("skip", 0), "max_skips is 0")]
)
def test_values_out_of_range_are_rejected(values, said):
    with pytest.raises(ValueError, match=said):
        NonFiniteGuard(values[0], **({"max_skips": values[1]} if len(values) > 1 else {}))
