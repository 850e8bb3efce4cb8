"""docs/teachers.md says which method takes which answer; the methods say it themselves."""

import re
from pathlib import Path
from typing import get_args

import pytest

import lightning_kd.public
from lightning_kd import CorrectedTopK, OnPolicyDistillation, SampledToken
from lightning_kd.fused import AnswerKind
from lightning_kd.modules import TeacherModule
from lightning_kd.teachers import TEACHERS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text()
METHODS = [
    method
    for method in vars(lightning_kd.public).values()
    if isinstance(method, type)
    and issubclass(method, TeacherModule)
    and method is not TeacherModule
]


def needs(method):
    if method is OnPolicyDistillation:  # its estimator says it
        return {*SampledToken.needs, *CorrectedTopK.needs}
    return set(method.needs)


@pytest.mark.parametrize("kind", get_args(AnswerKind))
def test_the_table_of_answers_is_what_the_methods_take(kind):
    (row,) = re.findall(rf"^\| `{kind}`.*\| (.*?) \|$", PAGE, flags=re.M)
    said = (
        {method.__name__ for method in METHODS} if row == "all" else {*re.findall(r"`(\w+)`", row)}
    )
    assert said == {method.__name__ for method in METHODS if kind in needs(method)}


def test_every_teacher_beside_those_of_several_is_on_the_page():
    for teacher in {teacher.__name__ for teacher in TEACHERS} - {
        "TeacherEnsemble",
        "RoutedTeacher",
    }:
        assert teacher in PAGE or teacher == "LocalTeacher"  # which a name alone stands for
