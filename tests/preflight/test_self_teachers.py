"""A run whose student teaches itself, before it starts."""

import io

import pytest
import torch
from rich.console import Console

from lightning_kd import (
    GKD,
    SFT,
    ArithmeticData,
    EMAStudent,
    FrozenStudent,
    LiveStudent,
    LocalTeacher,
    RoutedTeacher,
    StudentSpec,
    TeacherEnsemble,
    check,
)
from lightning_kd.models import LoRA
from tests.support.harness import trainer as trainer_of
from tests.support.toys import tiny_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def gkd(teacher, lora=None):
    return GKD(student=StudentSpec(config=CONFIG, lora=lora), teacher=teacher)


def sums(hint="solution"):
    return ArithmeticData(train_size=8, hint=hint)


def parts(report):
    return {part.what: part.bytes for part in report.facts.memory.parts}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(r=3)])
@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (lambda: EMAStudent(0.5), "32-true"),
        (lambda: EMAStudent(0.5), "bf16-true"),
        (FrozenStudent, "bf16-true"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_copy_takes_what_it_takes_in_the_run(make, precision, lora):
    module, data = gkd(make(), lora), sums()
    fit = trainer_of(max_steps=1, precision=precision)
    report = check(module, data, fit)
    assert [finding.name for finding in report.findings] == []
    assert module.teacher.local_models == {}
    (estimated,) = (size for what, size in parts(report).items() if "a copy of the student" in what)
    fit.fit(module, datamodule=data)
    own = {p.data_ptr() for p in module.student.parameters()}
    copied = [p for p in module.teacher.model.parameters() if p.data_ptr() not in own]
    assert estimated == sum(p.nbytes for p in copied)


def test_what_the_teacher_reads_is_shown():
    console = Console(width=100, record=True, file=io.StringIO())
    report = check(gkd(LiveStudent()), sums())
    row = sums()
    row.setup("fit")
    batch = row.batch_of("train", [0])
    expected = batch["prompt"][0] + batch["completion"][0] + batch["prompt"][0]
    assert report.facts.rows.told == expected
    report.show(console)
    assert f"teacher reads  {expected}" in console.export_text()
    assert check(SFT(student=StudentSpec(config=CONFIG)), sums("none")).facts.rows.told == ""


def test_the_live_student_is_no_second_model():
    report = check(gkd(LiveStudent()), sums())
    assert report.facts.teachers == []
    assert not [what for what in parts(report) if "teacher" in what or "copy" in what]
    assert [finding.name for finding in report.findings] == []


@pytest.mark.parametrize(
    ("module", "hint", "message"),
    [
        (
            lambda: gkd(LiveStudent()),
            "none",
            "the teacher is LiveStudent, and reads what the student",
        ),
        (
            lambda: gkd(
                TeacherEnsemble([LocalTeacher.of(tiny_llama(vocab_size=14)), EMAStudent(0.5)])
            ),
            "none",
            "the teacher is EMAStudent, and reads what the student",
        ),
        (
            lambda: SFT(student=StudentSpec(config=CONFIG)),
            "solution",
            "SFT asks none about its rows",
        ),
        (
            lambda: GKD(
                student=StudentSpec(config=CONFIG | {"max_position_embeddings": 20}),
                teacher=LiveStudent(),
            ),
            "solution",
            "train rows, as the teacher reads them, take up to 25 tokens, but the teacher has 20",
        ),
    ],
)
def test_what_fit_would_refuse_is_said_before(module, hint, message):
    report = check(module(), sums(hint), trainer_of(max_steps=1))
    assert any(message in text for text in report.facts.refused), report.facts.refused
    assert report.exit_code == 2


def test_the_check_of_copies_needs_no_weights():
    with torch.device("cpu"):
        report = check(gkd(FrozenStudent()), sums())
    assert (
        report.facts.student.parameters * 4 == parts(report)["FrozenStudent, a copy of the student"]
    )


def test_a_strategy_with_shards_is_checked_before_there_are_processes():
    other = LocalTeacher.of(tiny_llama(vocab_size=14))
    for teacher in (other, EMAStudent(0.5), TeacherEnsemble([other, LiveStudent()])):
        report = check(gkd(teacher), sums(), trainer_of(max_steps=1, strategy="fsdp2"))
        assert report.facts.refused == []
    routed = RoutedTeacher({"a": other, "b": EMAStudent(0.5)})
    report = check(gkd(routed), sums(), trainer_of(max_steps=1, strategy="fsdp2"))
    said = "EMAStudent is a member of a RoutedTeacher, and has its weights in shards under FSDP2"
    assert any(said in text for text in report.facts.refused), report.facts.refused
