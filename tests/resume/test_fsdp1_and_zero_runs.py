"""FSDP1 and ZeRO: what is written on the way, and read again."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.cpu_strategies import NAMES, written_under
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", params=NAMES)
def runs(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    return folder, written_under(name, "resume/fsdp1_and_zero_runs.py", folder / "runs.pt")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_bit_for_bit(runs):
    """In the middle of a window of rollouts, with dropout and AdamW."""
    _, results = runs
    losses, weights, tested = results["whole"]
    later, resumed, tested_later = results["resumed"]
    assert later == losses[2:]
    assert len({*losses}) == 4
    assert_same(resumed, weights)
    assert tested_later == tested


def test_what_was_trained_is_tested_by_the_same_trainer(runs):
    folder, results = runs
    module = GKD(
        student=StudentSpec(str(folder / "student")), teacher=LocalTeacher.of(tiny_llama(1))
    )
    (alone,) = trainer().test(module, datamodule=Letters(batch_size=4), verbose=False)
    assert results["whole"][2] == pytest.approx(alone["test/loss"], rel=1e-5)


def test_rollouts_are_shown_with_a_number_for_every_token(runs):
    """The student is run between steps, where its weights are in shards."""
    folder, _ = runs
    seen = EventAccumulator(str(folder / "version_0"), size_guidance={"tensors": 0})
    seen.Reload()
    (shown,) = seen.Tensors("rollout/samples/text_summary")
    numbers = re.findall(r"[a-p]:(\d+\.\d\d)", shown.tensor_proto.string_val[0].decode())
    assert len({*numbers}) > 5


def test_the_student_is_exported_whole(runs):
    folder, results = runs
    assert_same(
        AutoModelForCausalLM.from_pretrained(folder / "student").state_dict(), results["whole"][1]
    )


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(runs):
    folder, results = runs
    assert results["skipped"] == 1
    assert len(results["poisoned"][0]) == 2
    assert_same(results["poisoned"][1], results["one_step"][1])
    assert len(list((folder / "bad").glob("step2_rank[01]_batch0.safetensors"))) == 2


def test_another_students_checkpoint_is_named(runs):
    _, results = runs
    assert results["other"].startswith(
        "ValueError: the checkpoint is of another student: 21 weights"
    )


def test_a_checkpoint_is_not_executed(runs):
    folder, results = runs
    assert results["evil"].startswith("ValueError")
    assert "no checkpoint that can be read safely" in results["evil"]
    assert not (folder / "executed").exists()


def test_an_incomplete_checkpoint_is_named_and_the_newest_complete_one(runs):
    folder, results = runs
    said = results["incomplete"]
    assert (
        f"{folder / 'step=1.ckpt'} is no checkpoint that can be read safely: it is incomp" in said
    )
    assert f"newest complete one beside it is {folder / 'step=4.ckpt'}" in said


def test_nothing_is_left_of_the_writing(runs):
    folder, _ = runs
    steps = [f"step={number}.ckpt" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in folder.glob("*.ckpt*")) == steps
