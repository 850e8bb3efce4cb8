"""What a teacher with other tokens reads: prompts in its own template, rows of the data, and checks."""

import json
import re
from pathlib import Path

import pytest
import torch

from lightning_kd import check
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import (
    ArithmeticData,
    ChatData,
    DocumentData,
    PackedTextData,
    PromptCompletionData,
    arithmetic_tokenizer,
)
from lightning_kd.data.collate import Collator
from lightning_kd.fused import TokenLogProbs
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import SFT, ChunkLikelihoodKD, OnPolicyDistillation, SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import (
    LiveStudent,
    LocalTeacher,
    RetokenizingTeacher,
    ServedTeacher,
    Teacher,
)
from tests.serving.conftest import served
from tests.support.harness import GradientProbe, trainer
from tests.support.scripts import written_by
from tests.support.templates import CHATML, family_tokenizer
from tests.support.tokenizers import byte_level, tokenizer_of_kind
from tests.support.toys import tiny_llama

CHAT = {
    "messages": [
        {"role": "user", "content": "what is 2+2?"},
        {"role": "assistant", "content": "it is 4."},
        {"role": "user", "content": "and 2+3 ?"},
        {"role": "assistant", "content": "5, I think"},
    ]
}


class Recorder(Teacher):
    """Remembers what it was asked, and finds every token equally likely."""

    answers = frozenset({"token_log_probs"})
    vocabulary_size = 1000

    def answer(self, batch, positions, *, kind, logits_backend):
        self.batch, self.positions = batch, positions
        return TokenLogProbs(torch.full((len(positions.targets),), -2.0))


def asked(data, tokenizer, row=0, **batch):
    """The row in the teacher's tokens, as text, with what it is asked about in [[ ]]; its answer."""
    recorder = Recorder()
    teacher = RetokenizingTeacher(recorder, tokenizer=tokenizer)
    teacher.check_data(data)
    teacher.prepare(data.tokenizer, torch.device("cpu"), "equal")
    collated = Collator(0)([(row, row, data.rows("train").example(row, 0))]) | batch
    positions = ScoredPositions.from_labels(collated["labels"])
    answer = teacher.answer(
        collated, positions, kind="chunk_log_probs", logits_backend=DenseLogits()
    )
    answer.check(len(positions.targets), 1000)
    ids, scored = recorder.batch["input_ids"][0], recorder.batch["labels"][0] >= 0
    assert (ids[scored] == recorder.batch["labels"][0][scored]).all()
    first = int(scored.nonzero()[0])
    assert scored[first:].all()
    text = f"{tokenizer.decode(ids[:first])}[[{tokenizer.decode(ids[first:])}]]"
    return text, answer, collated, ids


def chats(**options):
    Path("chats.jsonl").write_text(json.dumps(CHAT))
    return ChatData(tokenizer=family_tokenizer("chatml"), train="chats.jsonl", **options)


def test_each_side_reads_a_chat_in_its_own_template():
    other = family_tokenizer("llama3")
    text, answer, batch, _ = asked(chats(teacher_tokenizer=other), other)
    whole = other.apply_chat_template(CHAT["messages"], tokenize=False)
    before, completion = whole.split("5, I think")
    assert text == f"{before}[[5, I think{other.eos_token}]]"
    assert completion.startswith(other.eos_token)
    assert batch["extra"]["teacher_prompt"] == [before]
    assert answer.chunks.min() == 0


def base_model():
    """A tokenizer with ChatML's template and another EOS, as that of a base model of Qwen."""
    tokenizer = family_tokenizer("chatml")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    # The end of a turn stays special, as a token that has no role.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert tokenizer.eos_token == "<|endoftext|>"
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda: family_tokenizer("gemma"), "<end_of_turn>"),
        (base_model, "<|im_end|>"),
        (lambda: family_tokenizer("llama3"), "<|eot_id|>"),
        (lambda: family_tokenizer("mistral"), "</s>"),
    ],
    ids=["gemma", "base model", "llama3", "mistral"],
)
@pytest.mark.parametrize("generated", [False, True])
def test_an_answer_ends_as_the_teachers_template_ends_a_turn(make, end, generated):
    other = make()
    data = chats(teacher_tokenizer=other)
    written = {}
    if generated:
        data.train_on = "none"  # prompts alone
        ids = data.tokenizer("5, I think")["input_ids"] + [data.tokenizer.eos_token_id]
        prompt = data.rows("train").example(0, 0).input_ids
        row = torch.tensor([[*prompt, *ids]])
        labels = row.where(torch.arange(row.shape[1]) >= len(prompt), -100)
        written = {"input_ids": row, "labels": labels, "completion_mask": labels >= 0}
    text, _, batch, _ = asked(data, other, **written)
    whole = other.apply_chat_template(CHAT["messages"], tokenize=False)
    assert whole.rstrip("\n").endswith(f"5, I think{end}")
    (before,) = batch["extra"]["teacher_prompt"]
    assert text == f"{before}[[5, I think{end}]]"


def test_whatever_ends_generation_ends_the_answer():
    """As further ids of a student's generation config, which is no matter of its tokenizer."""
    other = family_tokenizer("gemma")
    data = chats(teacher_tokenizer=other)
    data.train_on = "none"  # prompts alone
    prompt = data.rows("train").example(0, 0).input_ids
    row = torch.tensor([[*prompt, *data.tokenizer("5")["input_ids"], len(data.tokenizer) + 7]])
    labels = row.where(torch.arange(row.shape[1]) >= len(prompt), -100)
    written = {"input_ids": row, "labels": labels, "completion_mask": labels >= 0}
    for ended, end in ((True, "<end_of_turn>"), (False, "\ufffd")):
        text = asked(data, other, **written, ended=torch.tensor([ended]))[0]
        assert text.endswith(f"[[5{end}]]")


def test_a_students_template_may_write_the_end_and_an_eos_behind_it():
    """Without data.eos_token, of a student whose template ends turns with another token."""
    Path("chats.jsonl").write_text(json.dumps(CHAT))
    own, other = family_tokenizer("gemma"), family_tokenizer("gemma")
    data = ChatData(tokenizer=own, train="chats.jsonl", teacher_tokenizer=other)
    assert asked(data, other)[0].endswith("[[5, I think<end_of_turn>\n<eos>]]")
    data = ChatData(
        tokenizer=own, train="chats.jsonl", teacher_tokenizer=other, eos_token="<end_of_turn>"
    )
    assert asked(data, other)[0].endswith("[[5, I think<end_of_turn>]]")


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        ("{% if messages | length == 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML, True),
    ],
    ids=["no token", "refuses"],
)
def test_a_template_without_an_end_leaves_the_teachers_eos(template, warned, caplog):
    other = family_tokenizer("gemma")
    other.chat_template = template
    data = chats(teacher_tokenizer=other)
    assert asked(data, other)[0].endswith("[[5, I think<eos>]]")
    assert ("So the EOS of the student's answers is the teacher's" in caplog.text) == warned


def test_an_end_of_ones_own_is_a_token_of_the_teachers():
    rows = [{"prompt": "two", "completion": "four", "teacher_prompt": "Once", "teacher_end": "<e>"}]
    other = byte_level()
    columns = ["teacher_prompt", "teacher_end"]
    data = PromptCompletionData(tokenizer=byte_level(), train=rows, extra_columns=columns)
    with pytest.raises(
        ValueError,
        match="teacher_end is '<e>', which is no special or added token of the teacher's",
    ):
        asked(data, other)
    rows[0]["teacher_end"] = "a"
    data = PromptCompletionData(tokenizer=byte_level(), train=rows, extra_columns=columns)
    with pytest.raises(ValueError, match="teacher_end is 'a', which is no special or added token"):
        asked(data, other)
    rows[0]["teacher_end"] = "<|turn|>"
    data = PromptCompletionData(tokenizer=byte_level(), train=rows, extra_columns=columns)
    assert asked(data, other)[0] == "Once[[four<|turn|>]]"
    none = {"extra": {"teacher_prompt": ["Once"], "teacher_end": [None]}}
    assert asked(data, other, **none)[0] == "Once[[four</s>]]"


def test_prompts_of_ones_own_come_in_a_column():
    Path("rows.jsonl").write_text(
        json.dumps({"prompt": "two", "completion": "four", "teacher_prompt": "Once upon"})
    )
    data = PromptCompletionData(
        tokenizer=byte_level(), train="rows.jsonl", extra_columns=["teacher_prompt"]
    )
    other = tokenizer_of_kind("Unigram with byte fallback")
    assert asked(data, other)[0] == "Once upon[[four</s>]]"


@pytest.mark.parametrize("kind", ["Unigram with byte fallback", "byte-level BPE"])
def test_the_text_of_a_prompt_is_read_as_it_is(kind):
    Path("rows.jsonl").write_text(json.dumps({"prompt": "two and", "completion": "four"}))
    data = PromptCompletionData(tokenizer=byte_level(330), train="rows.jsonl")
    assert asked(data, tokenizer_of_kind(kind))[0] == "two and[[four</s>]]"


@pytest.mark.parametrize("prompt_length", [0, 3])
def test_a_document_is_one_text_on_both_sides(prompt_length):
    Path("documents.jsonl").write_text(json.dumps({"text": "The teacher reads the text"}))
    data = DocumentData(
        tokenizer=byte_level(), train="documents.jsonl", prompt_length=prompt_length
    )
    other = tokenizer_of_kind("SentencePiece BPE with byte fallback")
    _, answer, _, ids = asked(data, other)
    assert other.decode(ids) == "The teacher reads the text</s>"
    assert (answer.chunks >= 0).all()
    # Every token of the teacher has 2 nats.
    told = sum(answer.token_chunks >= 0)
    assert answer.log_probs.sum() == pytest.approx(-2.0 * told)


def test_chats_without_the_teachers_prompts_are_refused():
    other = family_tokenizer("llama3")
    for data, message in (
        (chats(), "data.teacher_tokenizer is None"),
        (chats(teacher_tokenizer=family_tokenizer("gemma")), "set it to the teacher's tokenizer"),
        (chats(teacher_tokenizer=other, train_on="all"), "data.train_on is all"),
    ):
        with pytest.raises(ValueError, match=message):
            asked(data, other)


def test_a_template_for_the_teacher_is_refused_where_it_renders_nothing_that_is_read():
    tokenizer = family_tokenizer("chatml")
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=len(tokenizer))),
        teacher=LocalTeacher.of(tiny_llama(1, vocab_size=len(tokenizer))),
    )
    with pytest.raises(ValueError, match=r"data.teacher_tokenizer renders prompts for a"):
        trainer(max_steps=1).fit(
            module, datamodule=chats(teacher_tokenizer=family_tokenizer("llama3"))
        )
    alone = SFT(student=StudentSpec.of(tiny_llama(0, vocab_size=len(tokenizer))))
    with pytest.raises(ValueError, match="SFT reads those of the data; leave it out"):
        trainer(max_steps=1).fit(
            alone, datamodule=chats(teacher_tokenizer=family_tokenizer("llama3"))
        )
    with pytest.raises(ValueError, match="has no chat template"):
        chats(teacher_tokenizer=byte_level()).rows("train")
    with pytest.raises(ValueError, match="give one of the two"):
        chats(teacher_tokenizer=tokenizer, extra_columns=["teacher_prompt"])


def test_a_teacher_that_is_told_more_in_the_students_tokens_is_refused():
    Path("rows.jsonl").write_text(
        json.dumps({"prompt": "two", "completion": "four", "solution": "and"})
    )
    own = byte_level()
    data = PromptCompletionData(
        tokenizer=own, train="rows.jsonl", teacher_prompt_template="{prompt} {solution}"
    )
    module = ChunkLikelihoodKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=len(own))),
        teacher=RetokenizingTeacher(
            LocalTeacher.of(tiny_llama(1, vocab_size=len(own))), tokenizer=own
        ),
    )
    with pytest.raises(ValueError, match="the teacher has tokens of its own; leave it out"):
        trainer(max_steps=1).fit(module, datamodule=data)
    with pytest.raises(ValueError, match="LiveStudent is the student"):
        RetokenizingTeacher(LiveStudent(), tokenizer=own)


def test_blocks_of_several_documents_are_refused():
    Path("text.txt").write_text("two and two were four. " * 20)
    data = PackedTextData(tokenizer=byte_level(), train="text.txt", block_length=8)
    with pytest.raises(ValueError, match=r"parts of several documents.*DocumentData"):
        RetokenizingTeacher(Recorder(), tokenizer=byte_level()).check_data(data)


def test_letters_that_the_teacher_lacks_are_refused_before_the_first_step():
    Path("rows.jsonl").write_text(
        json.dumps({"prompt": "two", "completion": "four"})
        + "\n"
        + json.dumps({"prompt": "two", "completion": "\u9999\u9999"})
    )
    own, other = byte_level(), tokenizer_of_kind("WordPiece")
    module = ChunkLikelihoodKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=len(own))),
        teacher=RetokenizingTeacher(
            LocalTeacher.of(tiny_llama(1, vocab_size=len(other))), tokenizer=other
        ),
    )
    data = PromptCompletionData(tokenizer=own, train="rows.jsonl")
    with pytest.raises(ValueError, match=r"data.train: .* cannot write all of"):
        trainer(max_steps=1).fit(module, datamodule=data)


@pytest.mark.parametrize("teacher_is_named", [True, False])
def test_a_check_of_such_a_run_compares_no_tokens(teacher_is_named, tmp_path):
    Path("rows.jsonl").write_text(json.dumps({"prompt": "two", "completion": "four"}))
    other = byte_level(400)
    model = tiny_llama(1, vocab_size=len(other), eos_token_id=other.eos_token_id)
    if teacher_is_named:
        model.save_pretrained(tmp_path / "teacher")
        other.save_pretrained(tmp_path / "teacher")
        teacher = RetokenizingTeacher(LocalTeacher(str(tmp_path / "teacher")))
    else:
        teacher = RetokenizingTeacher(LocalTeacher.of(model), tokenizer=other)
    own = byte_level()
    student = StudentSpec.of(
        tiny_llama(0, vocab_size=len(own), eos_token_id=own.eos_token_id, pad_token_id=0)
    )
    data = PromptCompletionData(tokenizer=own, train="rows.jsonl")
    report = check(ChunkLikelihoodKD(student=student, teacher=teacher), data)
    assert report.findings == ()
    assert len(report.facts.with_other_tokens) == 1
    assert not report.facts.teachers
    refused = check(SupervisedKD(student=student, teacher=teacher), data)
    assert any("choose a method that compares chunks" in f.says for f in refused.findings)
    assert check(SFT(student=student), data).facts.with_other_tokens == []


def two_tokenizers(**settings):
    """A student, and a teacher whose tokenizer makes fewer tokens of a text."""
    own, other = byte_level(262, texts=["a"]), byte_level()
    own.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|tool|>"]})
    size = {"vocab_size": len(other), "eos_token_id": other.eos_token_id}
    taught = LocalTeacher.of(tiny_llama(1, **size, **settings))
    student = StudentSpec.of(tiny_llama(0, vocab_size=len(own), eos_token_id=own.eos_token_id))
    return own, {"student": student, "teacher": RetokenizingTeacher(taught, tokenizer=other)}


FOUR = {"prompt": "two and two", "completion": "were four"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            FOUR | {"completion": "were four<|tool|>"},
            r"data.train: train\[3\]: the special token \d+ \('<\|tool\|>'\) has no counterpart",
        ),
        (
            FOUR | {"completion": "1234567890 1234567890"},
            r"data.train: train\[3\]: a row has 26 tokens of the teacher's, which reads 24 at most: "
            r"leave the row out \(set data.truncation: drop, and data.max_length lower\), or take",
        ),
    ],
    ids=["a special token", "a long row"],
)
def test_rows_that_a_teacher_cannot_read_are_refused_before_the_first_step(row, message):
    own, both = two_tokenizers(max_position_embeddings=24)
    data = PromptCompletionData(tokenizer=own, train=[*[FOUR] * 3, row], batch_size=1)
    fit = trainer(max_steps=1)
    with pytest.raises(ValueError, match=message):
        fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert fit.global_step == 0
    texts = ["two and two", "1234567890 1234567890"]
    assert sum(len(byte_level()(text)["input_ids"]) for text in texts) + 1 == 26
    found = check(ChunkLikelihoodKD(**both), data, trainer(max_steps=1)).findings
    assert any(re.search(message, finding.says) for finding in found)
    writing = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=4), table_every=0)
    # Completions that are generated are read in place of these.
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing])
    fit.fit(OnPolicyDistillation(**both), datamodule=data)
    assert fit.global_step == 1


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_rows_that_are_trained_on_in_part_are_looked_at(share):
    """Where the student generates a share of the completions, the others are the data's."""
    own, both = two_tokenizers()
    row = FOUR | {"completion": "were four<|tool|>"}
    data = PromptCompletionData(tokenizer=own, train=[*[FOUR] * 3, row], batch_size=1)
    options = {"generation": SamplingOptions(max_new_tokens=4), "table_every": 0}
    writing = OnPolicyGeneration(lmbda=share, **options)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing])
    message = r"data.train: train\[3\]: the special token \d+ .* has no counterpart"
    with pytest.raises(ValueError, match=message):
        fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert fit.global_step == 0
    planned = trainer(max_steps=1, max_epochs=-1, callbacks=[writing])
    found = check(ChunkLikelihoodKD(**both), data, planned).findings
    assert any(re.search(message, finding.says) for finding in found)
    always = OnPolicyGeneration(**options)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[always])
    fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert fit.global_step == 1


def test_an_end_of_ones_own_is_looked_at_in_every_row_before_the_first_step():
    own, both = two_tokenizers()
    rows = [FOUR | {"teacher_prompt": "Once", "teacher_end": end} for end in ("<|turn|>", "<e>")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["teacher_prompt", "teacher_end"]
    data = PromptCompletionData(
        tokenizer=own, train="rows.jsonl", batch_size=1, extra_columns=columns
    )
    fit = trainer(max_steps=2)
    message = r"data.train: .*rows.jsonl:2: teacher_end is '<e>', which is no special or added"
    with pytest.raises(ValueError, match=message):
        fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert fit.global_step == 0


def test_a_long_row_of_data_without_a_limit_has_another_cure():
    own = arithmetic_tokenizer()
    _, both = two_tokenizers(max_position_embeddings=3)
    both["student"] = StudentSpec.of(tiny_llama(0, vocab_size=len(own), eos_token_id=1))
    data = ArithmeticData(digits=1, validation_size=5, test_size=5, batch_size=1)
    message = (
        r"train\[0\]: a row has 7 tokens .* at most: leave the row out, or take a teacher that"
    )
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(ChunkLikelihoodKD(**both), datamodule=data)


def test_an_end_that_the_methods_tokenizer_does_not_have_is_refused():
    own, other = family_tokenizer("gemma"), family_tokenizer("llama3")
    data = chats(teacher_tokenizer=other)
    data = ChatData(
        tokenizer=own, train="chats.jsonl", teacher_tokenizer=other, eos_token="<end_of_turn>"
    )
    taught = LocalTeacher.of(tiny_llama(1, vocab_size=len(other), eos_token_id=other.eos_token_id))
    module = ChunkLikelihoodKD(
        student=StudentSpec.of(tiny_llama(0, vocab_size=len(own), eos_token_id=own.eos_token_id)),
        teacher=RetokenizingTeacher(taught, tokenizer=other),
        tokenizer=family_tokenizer("gemma"),
    )
    message = "EOS of the data is '<end_of_turn>', and that of model.tokenizer is '<eos>'"
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(module, datamodule=data)


def test_a_row_that_is_long_for_the_student_alone_is_read():
    """It has 33 tokens of the student's, and fewer of the teacher's than this reads."""
    own, both = two_tokenizers(max_position_embeddings=20)
    row = {"prompt": "The teacher", "completion": " reads the text and so"}
    data = PromptCompletionData(tokenizer=own, train=[row], batch_size=1)
    fit = trainer(max_steps=1)
    fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert data.longest()["train"][0] > 30
    assert fit.global_step == 1


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_prompt_that_the_teacher_reads_whole_is_not_cut_for_the_student(truncation):
    own, both = two_tokenizers()
    limits = {"max_prompt_length": 6, "truncation": truncation}
    rows = [FOUR | {"prompt": "two"}, FOUR | {"solution": "four"}]
    rows[0]["solution"] = "four"
    data = PromptCompletionData(tokenizer=own, train=rows, batch_size=1, **limits)
    message = r"train\[1\]: data.truncation cuts the prompt .* set data.truncation: drop"
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(ChunkLikelihoodKD(**both), datamodule=data)
    told = PromptCompletionData(
        tokenizer=own,
        train=rows,
        batch_size=1,
        max_teacher_length=99,
        teacher_prompt_template="{prompt} {solution}",
        **limits,
    )
    itself = SupervisedKD(student=both["student"], teacher=LiveStudent())
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(itself, datamodule=told)
    kept = PromptCompletionData(
        tokenizer=own, train=rows, batch_size=1, **limits | {"truncation": "drop"}
    )
    fit = trainer(max_steps=1)
    fit.fit(ChunkLikelihoodKD(**both), datamodule=kept)
    assert (len(kept.read_rows("train")), fit.global_step) == (1, 1)


def test_a_prompt_that_is_cut_in_a_split_that_is_not_read_is_left_alone():
    own, both = two_tokenizers()
    rows = {"train": [FOUR | {"prompt": "two"}], "validation": [FOUR], "test": [FOUR]}
    data = PromptCompletionData(
        tokenizer=own, batch_size=1, max_prompt_length=6, truncation="left", **rows
    )
    for _ in range(2):  # the second finds what the test has read
        fit = trainer(max_steps=1, limit_val_batches=0)
        fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
        assert fit.global_step == 1
        with pytest.raises(ValueError, match=r"test\[0\]: data.truncation cuts the prompt"):
            trainer().test(ChunkLikelihoodKD(**both), datamodule=data)
    with pytest.raises(ValueError, match=r"validation\[0\]: data.truncation cuts the prompt"):
        trainer(max_steps=1, limit_val_batches=1).fit(ChunkLikelihoodKD(**both), datamodule=data)


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_completion_may_be_cut_for_both(truncation):
    own, both = two_tokenizers()
    long = FOUR | {"completion": "were four and four"}
    data = PromptCompletionData(
        tokenizer=own, train=[long], batch_size=1, max_length=24, truncation=truncation
    )
    fit = trainer(max_steps=1)
    if truncation == "left":
        with pytest.raises(ValueError, match=r"data\.truncation cuts the prompt"):
            fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
        return
    fit.fit(ChunkLikelihoodKD(**both), datamodule=data)
    assert (data.read_rows("train").cut, fit.global_step) == (1, 1)


@pytest.mark.processes
def test_a_row_that_one_process_cannot_read_is_refused_on_all(tmp_path):
    found = written_by("teachers/two_ranks.py", tmp_path / "found.pt")
    assert found["message"].startswith(
        "process 1: a row has 10 tokens of the teacher's, which reads 6"
    )
    assert found["step"] == 1


@pytest.mark.processes
def test_a_served_teacher_is_asked_as_the_same_one_in_the_process():
    """Its server reads fewer tokens than the data's longest row has of the student's."""
    row = {"prompt": "The teacher", "completion": " reads the text and so"}
    gradients = []
    _, both = two_tokenizers(max_position_embeddings=20)
    other = both["teacher"].own_tokenizer
    with served(both["teacher"].teacher, tokenizer=other) as server:
        remote = RetokenizingTeacher(ServedTeacher([server.url]), tokenizer=other)
        for changed in ({}, {"teacher": remote}):
            own, fresh = two_tokenizers(max_position_embeddings=20)
            data = PromptCompletionData(tokenizer=own, train=[row], batch_size=1)
            probe = GradientProbe()
            module = ChunkLikelihoodKD(**fresh | changed)
            trainer(max_steps=1, callbacks=[probe]).fit(module, datamodule=data)
            gradients.append(probe.gradient)
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)
