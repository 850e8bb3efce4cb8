"""What ``fit`` refuses before its first step, a check says, and leaves all as it was."""

import pytest

from lightning_kd import (
    GKD,
    SFT,
    LocalTeacher,
    OnPolicyDistillation,
    PackedTextData,
    PromptCompletionData,
    PromptsAndText,
    RoutedTeacher,
    ServedTeacher,
    StudentSpec,
    SupervisedKD,
    check,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.callbacks.rollouts.health import HealthOptions
from lightning_kd.generation import SamplingOptions
from lightning_kd.modules import MiniLLM
from tests.preflight.places import chat_tokenizer
from tests.support.harness import trainer
from tests.support.toys import LETTERS

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 21,
}
ROWS = [{"prompt": LETTERS[n % 5 :][:3], "completion": LETTERS[n % 7 :][:5]} for n in range(16)]
TEXT = [{"text": LETTERS * 4}] * 8


def student(**changed):
    return StudentSpec(config=CONFIG | changed)


def teacher(**changed):
    return LocalTeacher(config=CONFIG | changed)


def data(rows=ROWS, **options):
    options = {"tokenizer": chat_tokenizer(), "batch_size": 4} | options
    return PromptCompletionData(train=rows, **options)


def prompts():
    return data([{"prompt": row["prompt"]} for row in ROWS], completion_column=None)


def two_streams(letters=LETTERS, block_length=16):
    text = PackedTextData(
        tokenizer=chat_tokenizer(letters), train=TEXT, block_length=block_length, batch_size=4
    )
    return PromptsAndText(data(), text)


def generating(sampling=None, **options):
    return [
        OnPolicyGeneration(
            generation=SamplingOptions(max_new_tokens=8, **sampling or {}), **options
        )
    ]


def unreachable():
    return ServedTeacher("http://127.0.0.1:9", payload="top_k", k=4, timeout=1, retries=0)


def routed():
    return RoutedTeacher({"a": teacher(), "b": teacher()})


RUNS = {
    "one object": (lambda: with_itself(), data, list, "one model object"),
    "prompts alone": (
        lambda: SFT(student=student()),
        prompts,
        list,
        "prompts alone: give on_policy",
    ),
    "prompts for half": (
        lambda: GKD(student=student(), teacher=teacher()),
        *(prompts, lambda: generating(lmbda=0.5), "prompts alone; set lmbda: 1"),
    ),
    "no samples": (
        lambda: OnPolicyDistillation(student=student(), teacher=teacher()),
        *(data, list, "add the callback OnPolicyGeneration"),
    ),
    "top_k": (
        lambda: OnPolicyDistillation(student=student(), teacher=teacher()),
        *(data, lambda: generating({"top_k": 5}), "top_k, top_p and greedy decoding distort"),
    ),
    "temperature": (
        lambda: OnPolicyDistillation(student=student(), teacher=teacher()),
        *(data, lambda: generating({"temperature": 0.5}), "sampled at temperature 0.5"),
    ),
    "no teacher": (lambda: SFT(student=student()), data, generating, "leave on_policy out"),
    "groups": (
        lambda: GKD(student=student(), teacher=teacher()),
        *(data, lambda: generating(group_size=3), "group_size 3 does not divide"),
    ),
    "column": (
        lambda: GKD(student=student(), teacher=routed()),
        *(data, generating, "no column 'teacher'"),
    ),
    "narrow": (lambda: SFT(student=student(vocab_size=9)), data, list, "the student has 9 logits"),
    "validation": (
        lambda: SFT(student=student()),
        *(lambda: data(validation="nope.jsonl"), list, "'nope.jsonl' does not exist"),
    ),
    "overlap": (
        lambda: GKD(student=student(), teacher=teacher()),
        *(data, lambda: generating(health=HealthOptions(overlap_k=50)), "overlap_k is 50"),
    ),
    "context": (
        lambda: SFT(student=student(max_position_embeddings=8)),
        *(data, list, "the student has 8 positions"),
    ),
    "widths": (
        lambda: SupervisedKD(student=student(), teacher=teacher(vocab_size=30)),
        *(data, list, "vocabulary mismatch"),
    ),
    "no server": (
        lambda: SupervisedKD(student=student(), teacher=unreachable()),
        *(data, list, "cannot be reach"),
    ),
    "another text": (
        lambda: MiniLLM(student=student(), teacher=teacher()),
        *(lambda: two_streams(LETTERS[::-1]), generating, "tokenizer of data.text"),
    ),
    "long text": (
        lambda: MiniLLM(student=student(max_position_embeddings=20), teacher=teacher()),
        *(lambda: two_streams(block_length=32), generating, "text rows take up to 32"),
    ),
}


def with_itself():
    model = student().build(chat_tokenizer())
    return SupervisedKD(student=StudentSpec.of(model), teacher=LocalTeacher.of(model))


@pytest.mark.parametrize("name", RUNS)
def test_what_fit_refuses_a_check_refuses(name):
    module, rows, callbacks, says = RUNS[name]
    report = check(module(), rows(), trainer(callbacks=callbacks(), max_steps=1))
    refused = [finding.says for finding in report.findings if finding.name == "refused"]
    assert any(says in said for said in refused), refused
    assert report.exit_code == 2
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # of the same message
        trainer(callbacks=callbacks(), max_steps=1).fit(module(), datamodule=rows())
    assert str(raised.value) in refused


def test_a_check_leaves_module_and_trainer_as_they_were():
    module, rows = GKD(student=student(), teacher=teacher()), data()
    fit = trainer(callbacks=generating(), max_steps=1, max_epochs=None)
    before = list(module.state_dict())
    report = check(module, rows, fit)
    assert [f.name for f in report.findings if f.name == "refused"] == []
    assert (list(module.state_dict()), dict(module.teacher.local_models)) == (before, {})
    assert getattr(fit, "datamodule", None) is None
    assert not hasattr(module, "student")
    fit.fit(module, datamodule=rows)
    assert fit.global_step == 1
