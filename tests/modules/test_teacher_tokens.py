"""Token budgets of several teachers, counted from the batches that were trained on."""

import pytest
import torch

from lightning_kd.callbacks.tensorboard_layout import LAYOUT
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SupervisedKD
from lightning_kd.teachers import LocalTeacher, TopKTeacher
from tests.callbacks.rollouts.test_health import Seen
from tests.callbacks.two_rank_health import Memory, Routed, gkd, routed, run
from tests.support.harness import trainer
from tests.support.toys import tiny_llama

NAMES = ("train/teacher_tokens/a", "train/teacher_tokens/b")


def counted(batches):
    """The tokens of each teacher so far, batch by batch."""
    totals = {"a": 0, "b": 0}
    for batch in batches:
        for name, labels in zip(batch["extra"]["teacher"], batch["labels"].tolist(), strict=True):
            totals[name] += sum(label != -100 for label in labels)
        yield tuple(totals.values())


def logged_at(memory):
    return [tuple(values[name] for name in NAMES) for _, values in sorted(memory.steps.items())]


def supervised(teacher=None, **options):
    return SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher or routed(), **options
    )


def fit(module, steps=3, *, callbacks=(), resume=None, **settings):
    """On the data's completions."""
    memory = Memory()
    run_ = trainer(
        max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **{"logger": memory} | settings
    )
    size = 8 // run_.accumulate_grad_batches
    run_.fit(module, datamodule=Routed(batch_size=size), ckpt_path=resume)
    return run_, memory


@pytest.mark.parametrize("wrapped", [False, True])
def test_they_are_the_labels_of_each_teachers_rows_since_the_run_began(wrapped):
    seen = Seen()
    teacher = TopKTeacher(routed(), k=5) if wrapped else routed()
    _, memory = fit(supervised(teacher), callbacks=[seen])
    assert logged_at(memory) == list(counted(seen.batches))
    assert logged_at(memory)[0][1] > 0


def test_on_policy_they_are_the_students_tokens_in_every_pass():
    seen = Seen()
    memory = run(gkd(), 4, options={"passes": 2}, callbacks=[seen])
    assert logged_at(memory) == list(counted(seen.batches))
    own, again, *_ = logged_at(memory)
    assert again == (2 * own[0], 2 * own[1])


@pytest.mark.parametrize("cut", [2, 4])
def test_they_do_not_depend_on_the_micro_batches_and_are_logged_once_a_step(cut):
    _, whole = fit(supervised())
    _, parts = fit(supervised(), accumulate_grad_batches=cut)
    assert logged_at(parts) == logged_at(whole)


def test_only_positions_that_take_part_are_counted():
    run_, memory = fit(supervised(position_share=0.4), 1)
    assert sum(logged_at(memory)[0]) == run_.callback_metrics["train/tokens"]


def test_a_resumed_run_goes_on_counting_and_another_begins_at_0(tmp_path):
    whole, (first, _) = fit(supervised(), 4)[1], fit(supervised(), 2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = supervised()
    again, rest = fit(module, 4, resume=tmp_path / "two.ckpt")
    assert logged_at(rest) == logged_at(whole)[2:]
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["teacher_tokens"]
    assert tuple(saved.values()) == logged_at(whole)[1]
    # Restored, and saved again before any step.
    again.save_checkpoint(tmp_path / "four.ckpt")
    saved = torch.load(tmp_path / "four.ckpt", weights_only=True)["teacher_tokens"]
    assert tuple(saved.values()) == logged_at(whole)[3]
    assert logged_at(fit(module, 1)[1]) == logged_at(whole)[:1]


def test_one_teacher_has_no_budget_and_the_layout_shows_those_of_several():
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    assert not any("teacher_tokens" in name for name in run(module, 1).steps[0])
    charts = [part for tab in LAYOUT.values() for part in tab.values()]
    assert ["Multiline", [r"train/teacher_tokens/.+$"]] in charts
