"""FSDP1 and ZeRO: what is written on the way, and read again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.modules.second_tier_grid import STRATEGIES
from tests.scripts import DEEPSPEED, needs_deepspeed, written_by


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=needs_deepspeed if "zero" in n else ()) for n in STRATEGIES],
)
def runs(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    python = DEEPSPEED if "zero" in name else None
    out = folder / "runs.pt"
    return folder, written_by("resume/second_tier_runs.py", out, name, python=python)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_bit_for_bit(runs):
    """In the middle of a window of rollouts, with dropout and AdamW."""
    _, results = runs
    losses, weights = results["whole"]
    later, resumed = results["resumed"]
    assert later == losses[2:]
    assert len({*losses}) == 4
    assert_same(resumed, weights)


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


def test_nothing_is_left_of_the_writing(runs):
    folder, _ = runs
    steps = [f"step={number}.ckpt" for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in folder.glob("*.ckpt*")) == steps
