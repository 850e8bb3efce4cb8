"""What the host waits for in a training step that is not logged, on a device whose work is queued."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_kd import devices
from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.callbacks import OnPolicyGeneration, TokensPerSecond
from lightning_kd.data import PackedTextData, PromptsAndText
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD, SFT, BabyLlama, MiniLLM, OnPolicyDistillation, SupervisedKD
from lightning_kd.normalization import TokenMean
from lightning_kd.teachers import EMAStudent, LiveStudent, LocalTeacher
from tests.support.harness import BatchList, Letters, trainer
from tests.support.looks import Looks
from tests.support.toys import LETTERS, letter_tokenizer, ragged_batch, tiny_llama

LATE = {"_look_at_sums", "_compare_counts"}
"""They look at the step before: at what has been copied to the host meanwhile."""

NAMED = {
    "_generate_window": "drawn texts are read",
    "find_places": "it looks at what is on the host, before it is copied",
}
"""What stands for all that it calls."""

ALWAYS = {
    "transformers/masking_utils.py:_ignore_causal_mask_sdpa": "transformers looks whether anything is "
    "padded, once or twice in each forward pass of each model, and gives no way around it but a mask "
    "of its own making for each kind of layer",
    "optim/optimizer.py:_get_value": "the optimizer's count of steps, on the host on any device",
    "lightning_kd/devices.py:flush": "the wait for these copies, which are there already",
    "_look_at_sums": "the sums of the step before, copied while this one was computed: so that an "
    "error comes one step late, and not never",
    "_compare_counts": "the same of the counts",
    "support/harness.py:<genexpr>": "batches are made on the host",
    "lightning_kd/data/rows.py:example": "batches are made on the host",
    **NAMED,
}


COUNTED_AHEAD = {"baby_llama_batchmean": {"lightning_kd/devices.py:of"}}
"""Batches of a step that a loader has on the host are counted there, before they are copied."""


@pytest.fixture
def queued(monkeypatch):
    """The CPU, treated as an accelerator."""
    monkeypatch.setattr(devices, "_IN_STEP", frozenset())


@pytest.fixture
def waits(queued, monkeypatch):
    """What is waited for in micro-batches, hooks included, but in the first two steps."""
    looks, run = Looks(LATE | set(NAMED)), _TrainingEpochLoop.advance

    def counting(self, *args, **kwargs):
        if self.trainer.global_step < 2:
            return run(self, *args, **kwargs)
        with looks:
            return run(self, *args, **kwargs)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", counting)
    return looks


def models():
    return {
        "student": StudentSpec.of(tiny_llama(0)),
        "teacher": LocalTeacher.of(tiny_llama(1)),
    }


def two_teachers():
    return {
        "student": StudentSpec.of(tiny_llama(0)),
        "teacher": [tiny_llama(1), tiny_llama(2)],
    }


def rollouts(**options):
    return OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=5), **options)


METHODS = {
    "sft": (lambda: SFT(student=StudentSpec.of(tiny_llama(0))), []),
    "supervised_kd": (lambda: SupervisedKD(**models()), []),
    "supervised_kd_dense": (lambda: SupervisedKD(**models(), logits_backend=DenseLogits()), []),
    "gkd": (lambda: GKD(**models()), []),
    "gkd_own_texts": (lambda: GKD(**models()), [{}]),
    "gkd_some_own_texts": (lambda: GKD(**models()), [{"lmbda": 0.5}]),
    "on_policy_distillation": (
        lambda: OnPolicyDistillation(**models(), gamma=0.9),
        [{"passes": 2}],
    ),
    "baby_llama": (lambda: BabyLlama(**two_teachers()), []),
    "baby_llama_batchmean": (lambda: BabyLlama(**two_teachers(), kl_scale="batchmean"), []),
    "minillm": (lambda: MiniLLM(**models()), [{"steps_per_window": 2}]),
    "sdft": (lambda: GKD(student=tiny_llama(0), teacher=EMAStudent(0.9)), [{}]),
    "opsd": (lambda: GKD(student=tiny_llama(0), teacher=LiveStudent()), []),
}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_not_logged_waits_for_nothing_that_is_avoidable(waits, name, accumulate):
    make, generates = METHODS[name]
    run = trainer(
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1000,
        callbacks=[TokensPerSecond(), *(rollouts(**options) for options in generates)],
        gradient_clip_val=1.0,
    )
    run.fit(make(), datamodule=Letters(48, batch_size=2, told=name in {"sdft", "opsd"}))
    assert not set(waits.places) - set(ALWAYS) - COUNTED_AHEAD.get(name, set()), waits.places
    assert waits.places["_look_at_sums"] > 0
    passes = waits.places["transformers/masking_utils.py:_ignore_causal_mask_sdpa"]
    number = {"sft": 1, "baby_llama": 3, "baby_llama_batchmean": 3}.get(name, 2)
    assert 1 <= passes / (number * 4 * accumulate) <= 2


def test_minillm_waits_no_more_with_a_second_stream(waits, tmp_path):
    (tmp_path / "text.txt").write_text((LETTERS * 30)[7:])
    blocks = PackedTextData(
        tokenizer=letter_tokenizer(),
        train=str(tmp_path / "text.txt"),
        block_length=8,
        batch_size=2,
    )
    run = trainer(max_steps=6, max_epochs=-1, log_every_n_steps=1000, callbacks=[rollouts()])
    run.fit(MiniLLM(**models()), datamodule=PromptsAndText(Letters(48, batch_size=2), blocks))
    assert not set(waits.places) - set(ALWAYS), waits.places


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd", "baby_llama_batchmean", "minillm"])
def test_weights_are_the_same_bit_for_bit_where_work_is_queued(name, monkeypatch):
    found = []
    for in_step in ({"cpu"}, set()):
        monkeypatch.setattr(devices, "_IN_STEP", frozenset(in_step))
        make, generates = METHODS[name]
        callbacks = [rollouts(**options) for options in generates]
        run = trainer(max_steps=3, max_epochs=-1, accumulate_grad_batches=2, callbacks=callbacks)
        module = make()
        run.fit(module, datamodule=Letters(batch_size=2))
        found.append((run.callback_metrics["train/loss"], module.student.state_dict()))
    (loss, weights), (late_loss, late_weights) = found
    assert loss == late_loss
    assert all(torch.equal(weights[name], late_weights[name]) for name in weights)


class CountsNothing(TokenMean):
    """A normalization that is wrong from the second optimizer step on."""

    def __init__(self, module):
        self.module = module

    def count(self, tokens_per_row):
        return super().count(tokens_per_row) * (self.module().global_step < 1)


class Steps(Callback):
    def __init__(self):
        self.begun = 0

    def on_train_batch_start(self, *_):
        self.begun += 1


def fit_wrongly(steps, max_steps):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    module.normalization = CountsNothing(lambda: module)
    with pytest.raises(ValueError, match="the normalization of the loss has the count"):
        trainer(max_steps=max_steps, max_epochs=-1, callbacks=[steps]).fit(
            module, datamodule=Letters(batch_size=2)
        )


def test_on_the_cpu_a_wrong_count_ends_its_own_step():
    steps = Steps()
    fit_wrongly(steps, 5)
    assert steps.begun == 2


def test_elsewhere_a_wrong_count_ends_the_step_after(queued):
    steps = Steps()
    fit_wrongly(steps, 5)
    assert steps.begun == 3


def test_a_wrong_count_of_the_last_step_is_not_lost(queued):
    fit_wrongly(Steps(), 2)


def test_a_checkpoint_holds_no_step_that_was_divided_wrongly(queued, tmp_path):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    module.normalization = CountsNothing(lambda: module)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    run = trainer(max_steps=5, max_epochs=-1, callbacks=[saving], enable_checkpointing=True)
    with pytest.raises(ValueError, match="the normalization of the loss has the count"):
        run.fit(module, datamodule=Letters(batch_size=2))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0-step=1.ckpt"]


class ChangesLabels(Callback):
    """Takes labels away, in the batch that the trainer has moved already."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["labels"][:, -3:] = IGNORE_INDEX


def test_a_callback_may_change_labels_in_place():
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    run = trainer(max_steps=1, callbacks=[ChangesLabels()])
    run.fit(module, datamodule=BatchList([ragged_batch([(1, 5), (2, 4)])]))
    # Six tokens a row, of which three have labels no more: two of five are left, and one of four.
    assert run.callback_metrics["train/tokens"] == 2 + 1


class TakesLabels(BatchList):
    """Data that moves batches by itself, and with fewer labels."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        labels = batch["labels"].clone()
        labels[:, -3:] = IGNORE_INDEX
        return {**batch, "labels": labels}


def test_what_moves_batches_by_itself_may_change_them():
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    run = trainer(max_steps=1)
    run.fit(module, datamodule=TakesLabels([ragged_batch([(1, 5), (2, 4)])]))
    assert len(module.micro_batch_loss.positions.places) == 2 + 1


def test_the_progress_bar_shows_the_loss_of_the_last_step_that_the_host_has():
    """On the CPU that is the step itself."""
    run = trainer(max_steps=2, max_epochs=-1, callbacks=[TokensPerSecond()])
    run.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=Letters(8, batch_size=2))
    shown = run.progress_bar_metrics
    assert shown["train/loss"] == pytest.approx(float(run.callback_metrics["train/loss"]))
    assert shown["train/tokens_per_second"] > 0


def test_tokens_per_second_of_a_queue_are_those_of_all_steps_since_the_last_log(
    queued, monkeypatch
):
    clock = itertools.count()
    monkeypatch.setattr("lightning_kd.callbacks.throughput.time.perf_counter", lambda: next(clock))
    rates = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.callback_metrics.get("train/tokens_per_second"))
            tokens.append(float(trainer.callback_metrics["train/tokens"]))

    tokens = []
    run = trainer(
        max_steps=4, max_epochs=-1, log_every_n_steps=2, callbacks=[TokensPerSecond(), Seen()]
    )
    run.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=Letters(16, batch_size=2))
    # Each step takes a second of this clock.
    first, second = sum(tokens[:2]) / 2, sum(tokens[2:]) / 2
    assert rates == [None, first, first, second]
