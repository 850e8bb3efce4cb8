"""What a cut to a shared vocabulary drops, of both sides: a mean over tokens."""

import pytest
import torch

from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCHES = [ragged_batch([(2, 9), (1, 7)], seed=1), ragged_batch([(4, 1)], seed=2)]


def beyond(network, width):
    """The mass beyond a width at each label of all batches, from the model's own logits."""
    masses = []
    with torch.no_grad():
        for batch in BATCHES:
            logits = network(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].double()
            masses.append(logits[batch["labels"][:, 1:] != -100].softmax(-1)[:, width:].sum(-1))
    return torch.cat(masses)


@pytest.mark.parametrize("logits", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("sizes", [(18, 21), (21, 18)], ids=["teacher", "student"])
def test_of_either_side_over_a_whole_evaluation(sizes, logits):
    student, teacher = (tiny_llama(seed, vocab_size=size) for seed, size in enumerate(sizes))
    module = SupervisedKD(
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        vocabulary="shared",
        logits_backend=logits,
    )
    side, wider = ("student", student) if sizes[0] > sizes[1] else ("teacher", teacher)
    expected = beyond(wider, 18).mean().item()
    with pytest.warns(UserWarning, match=rf"{side} gives {expected:.1%} .* beyond the 18"):
        (result,) = trainer(limit_val_batches=1.0).validate(
            module, datamodule=BatchList([], BATCHES), verbose=False
        )
    assert result[f"val/{side}_dropped_mass"] == pytest.approx(expected, rel=1e-5)
    other = "teacher" if side == "student" else "student"
    assert f"val/{other}_dropped_mass" not in result


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_of_several_teachers_their_weighted_mean(combine):
    members = [tiny_llama(seed, vocab_size=size) for seed, size in ((1, 21), (2, 24), (3, 18))]
    members.append(tiny_llama(4, vocab_size=30))
    weights = [0.5, 0.25, 0.25, 0.0]
    teacher = TeacherEnsemble(
        [LocalTeacher.of(member) for member in members], weights=weights, combine=combine
    )
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, vocabulary="shared"
    )
    masses = [w * beyond(m, 18).mean() for m, w in zip(members, weights, strict=True)]
    with pytest.warns(UserWarning, match="teacher gives"):
        (result,) = trainer(limit_test_batches=1.0).test(
            module, datamodule=BatchList([], BATCHES), verbose=False
        )
    assert result["test/teacher_dropped_mass"] == pytest.approx(sum(masses).item(), rel=1e-5)


def test_of_routed_teachers_that_of_each_rows_own():
    wide = tiny_llama(1, vocab_size=24)
    members = {"wide": LocalTeacher.of(wide), "narrow": LocalTeacher.of(tiny_llama(2))}
    teacher = RoutedTeacher(members)
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, vocabulary="shared"
    )
    batches = [{**BATCHES[0], "extra": {"teacher": ["wide", "narrow"]}}]
    first = beyond(wide, 18)[:9]  # of the row with 9 labels; the other has 7
    with pytest.warns(UserWarning, match="teacher gives"):
        (result,) = trainer(limit_test_batches=1.0).test(
            module, datamodule=BatchList([], batches), verbose=False
        )
    assert result["test/teacher_dropped_mass"] == pytest.approx(first.sum().item() / 16, rel=1e-5)


@pytest.mark.parametrize("kind", ["ensemble", "routed"])
def test_equal_vocabularies_are_those_of_all_members(kind):
    members = [LocalTeacher.of(tiny_llama(seed, vocab_size=18 + 3 * seed)) for seed in (0, 1)]
    teacher = (
        TeacherEnsemble(members)
        if kind == "ensemble"
        else RoutedTeacher({"a": members[0], "b": members[1]})
    )
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    named = "0 18, 1 21" if kind == "ensemble" else "'a' 18, 'b' 21"
    with pytest.raises(
        ValueError, match=rf"unequal vocabularies \({named}\), and vocabulary: equal"
    ):
        trainer().validate(module, datamodule=BatchList([], BATCHES), verbose=False)
