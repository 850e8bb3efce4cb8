"""A model with a device of its own, which is run on the next micro-batch while the student trains."""

import gc
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd import devices
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import GKD, MiniLLM, SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble, local
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import ragged_batch, tiny_llama

CPU = torch.device("cpu")
BATCH = ragged_batch([(2, 4), (1, 3)])


def elsewhere(monkeypatch, *, queued=True):
    """Let teachers take the CPU for a device of their own, and perhaps for one whose work is queued."""
    monkeypatch.setattr(local, "own_device", lambda placement, device: CPU)
    if queued:
        monkeypatch.setattr(devices, "_IN_STEP", frozenset())


class Order(Callback):
    """The order of forward passes in training, and what becomes of the weights."""

    def __init__(self):
        self.passes, self.training = [], False

    def on_fit_start(self, trainer, pl_module):
        for role, model in pl_module.models.items():
            model.register_forward_pre_hook(
                lambda _, args, given, role=role: self.note(role[0], given), with_kwargs=True
            )

    def on_train_batch_start(self, *_):
        self.training = True

    def on_train_batch_end(self, *_):
        self.training = False

    def note(self, role, given):
        # To find a model's head it is run once on ids alone.
        if self.training and "attention_mask" in given:
            self.passes.append(role)


def one_teacher():
    return LocalTeacher.of(tiny_llama(1))


def two_teachers():
    return TeacherEnsemble([one_teacher(), LocalTeacher.of(tiny_llama(2))])


def distilled(make=SupervisedKD, teacher=one_teacher, generates=(), steps=4, **settings):
    order = Order()
    options = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 4} | settings
    writing = [OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=5)) for _ in generates]
    run = trainer(callbacks=[*writing, order], limit_val_batches=2, **options)
    module = make(student=StudentSpec.of(tiny_llama(0)), teacher=teacher())
    run.fit(module, datamodule=Letters(batch_size=2))
    return order, module, run


def without_speed(run):
    timed = {"rollout/tokens_per_second", "rollout/time_share"}
    return {k: v.item() for k, v in run.callback_metrics.items() if k not in timed}


CASES = {
    "one": {},
    "ensemble": {"teacher": two_teachers},
    "accumulated": {"accumulate_grad_batches": 2},
    "gkd": {"make": GKD},
    "own_texts": {"make": GKD, "generates": [1], "accumulate_grad_batches": 2},
    "minillm": {"make": MiniLLM, "generates": [1], "accumulate_grad_batches": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_and_losses_are_those_of_a_run_that_does_not_look_ahead(case, monkeypatch):
    order, module, run = distilled(**CASES[case])
    elsewhere(monkeypatch)
    ahead, other, again = distilled(**CASES[case])
    assert without_speed(run) == without_speed(again)
    weights, others = module.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert ahead.passes != order.passes
    assert ahead.passes.count("s") == order.passes.count("s")


def test_the_teacher_reads_the_next_micro_batch_before_the_student_reads_this_one(monkeypatch):
    order, _, _ = distilled(steps=5)
    assert order.passes == ["t", "s"] * 5
    elsewhere(monkeypatch)
    order, _, _ = distilled(steps=5, max_epochs=1)
    # Also after the fourth step, behind which there is a validation.
    assert order.passes == [*"tts", *"ts" * 4]


def test_at_the_end_of_an_epoch_nothing_comes(monkeypatch):
    elsewhere(monkeypatch)
    order, _, _ = distilled(steps=-1, max_epochs=2, val_check_interval=None)
    # Six micro-batches an epoch, each of which the teacher reads once.
    assert order.passes == [*"tts", *"ts" * 4, "s"] * 2


def test_completions_of_the_student_are_read_ahead_within_their_window(monkeypatch):
    elsewhere(monkeypatch)
    order, _, _ = distilled(GKD, generates=[1], steps=2, accumulate_grad_batches=2)
    # Before the second micro-batch of each window; the student generates in front of it.
    reads = "".join(order.passes).replace("ss", "s").replace("ss", "s")
    assert reads.count("tts") == 2
    assert order.passes.count("t") == 4


def test_a_model_of_the_host_is_read_when_it_is_asked(monkeypatch):
    """What it would compute ahead, the host would have to compute before the student's step."""
    _, module, _ = distilled()
    elsewhere(monkeypatch, queued=False)
    order, other, _ = distilled()
    assert order.passes == ["t", "s"] * 4
    weights, others = module.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("asked", ["again", "other ids", "other positions", "another backend"])
def test_another_micro_batch_than_was_announced_is_computed_anew(asked, monkeypatch, tokenizer):
    elsewhere(monkeypatch)
    teacher, backend = one_teacher(), FusedLogits()
    teacher.prepare(tokenizer, CPU, "equal")
    positions = ScoredPositions.from_labels(BATCH["labels"])
    teacher.answer(BATCH, positions, logits_backend=backend)
    teacher.announce(BATCH, positions, kind="full_distribution")
    batch, passes = dict(BATCH), []
    if asked == "other ids":
        batch["input_ids"] = (19 - batch["input_ids"]) % 18
    if asked == "other positions":
        positions = positions.subset(torch.arange(7) > 2)
    if asked == "another backend":
        backend = DenseLogits()
    teacher.model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = teacher.answer(batch, positions, logits_backend=backend)
    assert len(passes) == (asked != "again")
    assert (teacher._announced is None) == (asked == "again")
    fresh = one_teacher()
    fresh.prepare(tokenizer, CPU, "equal")
    expected = fresh.answer(batch, positions, logits_backend=backend)
    for one, other in zip(found.sources, expected.sources, strict=True):
        ours, theirs = torch.empty(one.shape), torch.empty(one.shape)
        one.fill(slice(0, one.shape[0]), ours)
        other.fill(slice(0, one.shape[0]), theirs)
        assert torch.equal(ours, theirs)


def test_ids_that_were_changed_in_place_are_read_anew(monkeypatch, tokenizer):
    elsewhere(monkeypatch)
    teacher, backend = one_teacher(), FusedLogits()
    teacher.prepare(tokenizer, CPU, "equal")
    batch = ragged_batch([(2, 4), (1, 3)])
    positions = ScoredPositions.from_labels(batch["labels"])
    teacher.answer(batch, positions, logits_backend=backend)
    teacher.announce(batch, positions, kind="full_distribution")
    passes = []
    teacher.model.register_forward_pre_hook(lambda *_: passes.append(1))
    batch["input_ids"][0, 0] += 1
    teacher.answer(batch, positions, logits_backend=backend)
    assert passes == [1]


def test_a_teacher_on_the_students_device_does_not_look_ahead(tokenizer):
    for placement in ("replicated", "offloaded", "cpu"):
        teacher = LocalTeacher.of(tiny_llama(1), placement=placement)
        teacher.prepare(tokenizer, CPU, "equal")
        assert not teacher.looks_ahead
        assert not TeacherEnsemble([teacher]).looks_ahead


class Fails(Callback):
    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_step == 2:
            raise KeyError("in the middle of a step")


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["by its limit", "by an error"])
def test_nothing_is_kept_when_a_run_has_ended(ends, monkeypatch):
    elsewhere(monkeypatch)
    kept, announce = [], LocalTeacher.announce

    def announced(self, *arguments, **options):
        announce(self, *arguments, **options)
        kept.append(weakref.ref(self._announced.batch["input_ids"]))

    monkeypatch.setattr(LocalTeacher, "announce", announced)
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=two_teachers())
    run = trainer(max_steps=4, callbacks=[Fails()] if ends == "by an error" else [])
    if ends == "by an error":
        with pytest.raises(KeyError):
            run.fit(module, datamodule=Letters(batch_size=2))
    else:
        run.fit(module, datamodule=Letters(batch_size=2))
    assert module.coming is None
    assert all(member._announced is None for member in module.teacher.members)
    assert len(kept) >= 4
    del run
    gc.collect()
    assert sum(reference() is not None for reference in kept) <= 2


def test_one_answer_is_kept_at_a_time(monkeypatch):
    elsewhere(monkeypatch)
    alive, announce = [], LocalTeacher.announce

    def announced(self, *arguments, **options):
        announce(self, *arguments, **options)
        alive.append(weakref.ref(self._announced.batch["input_ids"]))

    monkeypatch.setattr(LocalTeacher, "announce", announced)
    distilled(steps=5, val_check_interval=None)
    assert len(alive) == 5
    assert sum(reference() is not None for reference in alive) <= 1


def test_a_resumed_run_looks_ahead_anew(tmp_path, monkeypatch):
    _, whole, _ = distilled(steps=4, accumulate_grad_batches=2)
    elsewhere(monkeypatch)
    settings = {"max_epochs": -1, "accumulate_grad_batches": 2}
    for steps, path in ((2, None), (4, tmp_path / "half.ckpt")):
        module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=one_teacher())
        run = trainer(max_steps=steps, **settings)
        run.fit(module, datamodule=Letters(batch_size=2), ckpt_path=path)
        if path is None:
            run.save_checkpoint(tmp_path / "half.ckpt")
    weights, others = whole.student.state_dict(), module.student.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_loader_that_does_not_know_what_comes_does_without(monkeypatch):
    elsewhere(monkeypatch)
    order = Order()
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=one_teacher())
    trainer(callbacks=[order]).fit(module, datamodule=BatchList([BATCH, BATCH]))
    assert order.passes == ["t", "s"] * 2
