"""What a cut to a shared vocabulary drops, of both sides: a mean over tokens."""

import pytest
import torch

from lightning_kd.fused import LazyHeadLogits, lazy_logits
from lightning_kd.fused.head_matmul import project
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.modules.dropped_mass import DroppedMass
from lightning_kd.modules.loss import Scores
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


def test_of_routed_ensembles_the_weighted_mean_of_each_rows_own():
    alone, *pair = (tiny_llama(seed, vocab_size=size) for seed, size in ((1, 24), (2, 21), (3, 30)))
    both = TeacherEnsemble([LocalTeacher.of(model) for model in pair], weights=[0.75, 0.25])
    teacher = RoutedTeacher({"alone": LocalTeacher.of(alone), "both": both})
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, vocabulary="shared"
    )
    batches = [{**BATCHES[0], "extra": {"teacher": ["alone", "both"]}}]
    of_both = 0.75 * beyond(pair[0], 18)[9:16] + 0.25 * beyond(pair[1], 18)[9:16]
    expected = (beyond(alone, 18)[:9].sum() + of_both.sum()).item() / 16
    with pytest.warns(UserWarning, match="teacher gives"):
        (result,) = trainer(limit_test_batches=1.0).test(
            module, datamodule=BatchList([], batches), verbose=False
        )
    assert result["test/teacher_dropped_mass"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_nats_are_over_all_tokens_of_the_student(bias):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 4, generator=generator).double() for n in (6, 21))
    offset = torch.randn(21, generator=generator).double() if bias else None
    student = LazyHeadLogits(((states, weight),), offset, scale=1.5, softcap=5.0)
    whole = torch.empty(6, 21, dtype=torch.float64)
    student.fill(slice(0, 6), whole)
    labels = torch.tensor([0, 3, 17, 5, 9, 2])
    hidden = DroppedMass(Scores(None, student, None), 18)
    over_shared = torch.nn.functional.cross_entropy(whole[:, :18], labels, reduction="none")
    found = hidden.measure(whole[None, :, :18].logsumexp(-1), over_shared)
    expected = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    torch.testing.assert_close(found.label_nats, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.of_student, whole.softmax(-1)[:, 18:].sum(-1))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_only_the_logits_beyond_the_cut_are_computed_for_it(side, monkeypatch):
    computed = []

    def count(states, weight, out, *, add=False):
        computed.append(len(states) * len(weight))
        project(states, weight, out, add=add)

    monkeypatch.setattr(lazy_logits, "project", count)
    wide, narrow = tiny_llama(0, vocab_size=24), tiny_llama(1)
    student, teacher = (wide, narrow) if side == "student" else (narrow, wide)
    module = SupervisedKD(
        student=StudentSpec.of(student), teacher=LocalTeacher.of(teacher), vocabulary="shared"
    )
    data, options = BatchList([], BATCHES), {"limit_test_batches": 1.0}
    with pytest.warns(UserWarning, match=f"{side} gives"):  # and the heads are compared once
        trainer(**options).test(module, datamodule=data, verbose=False)
    computed.clear()
    trainer(**options).test(module, datamodule=data, verbose=False)
    positions = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in BATCHES)
    # The shared tokens of both sides once, and those beyond them once.
    assert sum(computed) == positions * (18 + 18 + 6)
