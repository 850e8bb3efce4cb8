"""A teacher that is the student."""

import pytest

from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, RLDistillation, SupervisedKD
from lightning_kd.rewards import exact_match
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3)]))


@pytest.fixture
def start():
    tiny_llama(1).save_pretrained("start")
    letter_tokenizer().save_pretrained("start")
    return "start"


def fit(module):
    trainer(max_steps=1).fit(module, datamodule=BatchList([BATCH], evaluate=[BATCH]))


@pytest.mark.parametrize("method", [GKD, SupervisedKD])
@pytest.mark.parametrize("teacher", ["start", "./start", "../{}/start"])
def test_a_teacher_from_where_the_student_starts_is_refused(start, tmp_path, method, teacher):
    name = teacher.format(tmp_path.name)
    module = method(student=StudentSpec(start), teacher=LocalTeacher(name))
    with pytest.raises(ValueError, match=r"student and teacher are both 'start'.* another teacher"):
        fit(module)


def test_a_misspelt_vocabulary_is_refused(start):
    with pytest.raises(ValueError, match=r"unknown vocabulary 'share'; .*'equal', 'shared'"):
        SupervisedKD(student=StudentSpec(start), teacher=start, vocabulary="share")


def test_one_object_cannot_be_both(start):
    model = tiny_llama(1)
    for teacher in (LocalTeacher.of(model), TeacherEnsemble([LocalTeacher.of(model)] * 2)):
        with pytest.raises(ValueError, match="student and teacher are one model object"):
            fit(SupervisedKD(student=StudentSpec.of(model), teacher=teacher))
    assert all(weight.requires_grad for weight in model.parameters())


def test_where_there_is_more_to_learn_it_is_a_reference(start):
    fit(
        SupervisedKD(student=StudentSpec(start), teacher=TeacherEnsemble([LocalTeacher(start)] * 2))
    )
    other = LocalTeacher(start, quantization={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert not StudentSpec(start).is_same_checkpoint(other)
    assert RLDistillation.learns_from_its_start
    RLDistillation(student=StudentSpec(start), teacher=LocalTeacher(start), rewards=[exact_match])


def test_a_model_can_be_measured_against_itself(start):
    module = SupervisedKD(student=StudentSpec(start), teacher=LocalTeacher(start))
    (measured,) = trainer().test(module, datamodule=BatchList([], evaluate=[BATCH]), verbose=False)
    assert measured["test/forward_kl"] == pytest.approx(0, abs=1e-7)
