"""Bits per byte and the report by document, against a direct sum in float64."""

import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd import (
    SFT,
    ChatData,
    DenseLogits,
    DocumentData,
    FusedLogits,
    PackedTextData,
    PromptCompletionData,
    SupervisedKD,
)
from lightning_kd.callbacks import CompletionSamples, DocumentLikelihoods, ExposureBias
from lightning_kd.data.tokenizer_training import train_tokenizer
from lightning_kd.evaluation import DistinctN
from tests.support.harness import trainer
from tests.test_token_bytes import sentence_piece

TEXTS = [
    "two and two is four",
    "\u00e9t\u00e9",
    "to be, or not to be: that is the question, " * 3,
    " x ",
    "five",
]
TOKENIZER = train_tokenizer(TEXTS, 280)


def student(seed=0, **sizes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        **({"vocab_size": 280} | sizes),
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def direct(text, length=256, model=None):
    """Nats and tokens of a document by transformers' own loss, a window at a time."""
    model = (model or student()).double().eval()
    ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    total, start = 0.0, 0
    while start < len(ids) - 1:
        window = torch.tensor([ids[start : start + length]])
        total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
        start += length - 1
    first = len(TOKENIZER.convert_ids_to_tokens(ids[0]))  # byte-level: a letter for each byte
    return total, len(ids) - 1, len(text.encode()) - first


def rows(texts=TEXTS):
    return [{"text": text, "book": "ab"[place % 2]} for place, text in enumerate(texts)]


def evaluated(data, *callbacks, module=None, **settings):
    fit = trainer(limit_val_batches=1.0, callbacks=list(callbacks), **settings)
    (result,) = fit.validate(module or SFT(student=student()), datamodule=data, verbose=False)
    return result


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("length", [256, 16])
def test_documents_cost_what_transformers_says_also_over_windows(tmp_path, length):
    data = DocumentData(
        tokenizer=TOKENIZER,
        validation=rows(),
        max_length=length,
        truncation="windows",
        batch_size=2,
    )
    found = evaluated(data, DocumentLikelihoods(str(tmp_path / "a" / "documents.jsonl")))
    wanted = [direct(text, length) for text in TEXTS]
    written = records(tmp_path / "a" / "documents.jsonl")
    assert [record["document"] for record in written] == [0, 1, 2, 3, 4]
    for record, (nats, tokens, size) in zip(written, wanted, strict=True):
        assert record["nats"] == pytest.approx(nats, rel=1e-5)
        assert (record["tokens"], record["bytes"]) == (tokens, size)
    nats, tokens, size = map(sum, zip(*wanted, strict=True))
    assert found["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["val/tokens"] == tokens


@pytest.mark.parametrize(("policy", "named"), [("drop", [0, 2, 4]), ("windows", [0, 1, 2, 3, 4])])
def test_a_document_is_named_by_its_row_in_the_data_whatever_columns_that_has(
    tmp_path, policy, named
):
    texts = ["two", "to be or not to be that is the question", "is", "x" * 40, "four"]
    data = DocumentData(
        tokenizer=TOKENIZER,
        validation=[{"text": text, "document": "x"} for text in texts],
        extra_columns=["document"],
        max_length=12,
        truncation=policy,
        batch_size=2,
    )
    evaluated(data, DocumentLikelihoods(str(tmp_path / "d.jsonl")))
    assert [record["document"] for record in records(tmp_path / "d.jsonl")] == named
    evaluated(data, DocumentLikelihoods(str(tmp_path / "d.jsonl"), document_column="document"))
    assert [record["document"] for record in records(tmp_path / "d.jsonl")] == ["x"]


def test_rows_of_one_document_are_added_up(tmp_path):
    data = DocumentData(
        tokenizer=TOKENIZER, validation=rows(), extra_columns=["book"], batch_size=2
    )
    evaluated(data, DocumentLikelihoods(str(tmp_path / "d.jsonl"), document_column="book"))
    odd, even = records(tmp_path / "d.jsonl")
    assert (odd["document"], even["document"]) == ("a", "b")
    assert odd["nats"] == pytest.approx(sum(direct(text)[0] for text in TEXTS[::2]), rel=1e-5)
    assert even["tokens"] == sum(direct(text)[1] for text in TEXTS[1::2])


def test_a_column_that_the_rows_do_not_have_is_refused(tmp_path):
    data = DocumentData(tokenizer=TOKENIZER, validation=rows())
    with pytest.raises(ValueError, match="document_column is 'bok'"):
        evaluated(data, DocumentLikelihoods(str(tmp_path / "d.jsonl"), document_column="bok"))


def test_the_file_that_the_data_is_read_from_is_not_written_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    before = "".join(json.dumps(row) + "\n" for row in rows())
    path.write_text(before)
    data = DocumentData(tokenizer=TOKENIZER, validation=str(path))
    with pytest.raises(ValueError, match=r"DocumentLikelihoods.path is .*, which this run reads"):
        evaluated(data, DocumentLikelihoods(str(path)))
    assert path.read_text() == before


def test_only_completions_are_counted_where_only_they_are_scored():
    pairs = [{"prompt": "two and ", "completion": "two is"}, {"prompt": "f", "completion": "ive"}]
    data = PromptCompletionData(tokenizer=TOKENIZER, validation=pairs, batch_size=2)
    found = evaluated(data)
    total, model = 0.0, student().double().eval()
    for pair in pairs:
        prompt = TOKENIZER(pair["prompt"])["input_ids"]
        ids = [*prompt, *TOKENIZER(pair["completion"])["input_ids"], TOKENIZER.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(scores[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
    assert found["val/bits_per_byte"] == pytest.approx(total / math.log(2) / 9, rel=1e-5)


@pytest.mark.parametrize("tokenizer", [sentence_piece, lambda: sentence_piece(adds_space=False)])
def test_the_space_that_a_tokenizer_puts_before_a_completion_is_none_of_its_bytes(
    tmp_path, tokenizer
):
    tokenizer, path = tokenizer(), tmp_path / "d.jsonl"
    pairs = [("Once", "a"), ("Once", "On"), ("t a", "  a"), ("Once ", "")]
    data = PromptCompletionData(
        tokenizer=tokenizer,
        validation=[{"prompt": prompt, "completion": text} for prompt, text in pairs],
        batch_size=3,
    )
    found = evaluated(data, DocumentLikelihoods(str(path)))
    assert [record["bytes"] for record in records(path)] == [1, 2, 3, 0]
    nats = sum(record["nats"] for record in records(path))
    assert found["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / 6, rel=1e-5)


def test_the_space_behind_the_prompt_of_a_document_is_of_the_document(tmp_path):
    """Its prompt is the beginning of one text, so that nothing was put before the rest."""
    tokenizer, path = sentence_piece(), tmp_path / "d.jsonl"
    data = DocumentData(
        tokenizer=tokenizer, validation=[{"text": "On a"}, {"text": "ce at"}], prompt_length=3
    )
    evaluated(data, DocumentLikelihoods(str(path)))
    assert [record["bytes"] for record in records(path)] == [len(" a"), len(" at")]


def test_the_space_before_an_answer_is_of_the_chat_unless_it_was_tokenized_apart(tmp_path):
    tokenizer, path = sentence_piece(), tmp_path / "d.jsonl"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}"
    )
    chats = [("Once", " at"), ("O", "nce")]  # "On" is one token of the whole
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in chats
    ]
    evaluated(ChatData(tokenizer=tokenizer, validation=rows), DocumentLikelihoods(str(path)))
    assert [record["bytes"] for record in records(path)] == [3, 3]


def test_bits_per_byte_are_the_students_whatever_it_learns_from():
    data = PackedTextData(tokenizer=TOKENIZER, validation=rows(), block_length=16, batch_size=2)
    alone = evaluated(data)["val/bits_per_byte"]
    taught = SupervisedKD(student=student(), teacher=student(1), alpha=0.0)
    assert evaluated(data, module=taught)["val/bits_per_byte"] == alone


@pytest.mark.filterwarnings("ignore:the (student|teacher) gives")
@pytest.mark.parametrize("logits", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("widths", [(300, 280), (280, 300)], ids=["student", "teacher"])
def test_they_are_over_all_tokens_of_the_student_also_where_a_teacher_shares_fewer(
    tmp_path, widths, logits
):
    wider, teacher = (student(seed, vocab_size=width) for seed, width in enumerate(widths))
    module = SupervisedKD(
        student=wider, teacher=teacher, vocabulary="shared", alpha=0.5, logits_backend=logits
    )
    data = DocumentData(tokenizer=TOKENIZER, validation=rows(), batch_size=2)
    found = evaluated(data, DocumentLikelihoods(str(tmp_path / "d.jsonl")), module=module)
    wanted = [direct(text, model=wider) for text in TEXTS]
    for record, (nats, _, _) in zip(records(tmp_path / "d.jsonl"), wanted, strict=True):
        assert record["nats"] == pytest.approx(nats, rel=1e-5)
    nats, tokens, size = map(sum, zip(*wanted, strict=True))
    assert found["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_is_watched_and_the_file_is_that_of_the_last_validation(tmp_path):
    data = DocumentData(tokenizer=TOKENIZER, train=rows(), validation=rows(), batch_size=2)
    module = SFT(student=student())
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/bits_per_byte", save_top_k=2)
    fit = trainer(
        max_steps=2,
        limit_val_batches=1.0,
        val_check_interval=1,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        callbacks=[
            best,
            EarlyStopping("val/bits_per_byte"),
            DocumentLikelihoods(str(tmp_path / "d.jsonl")),
        ],
    )
    fit.fit(module, datamodule=data)
    wanted = direct(TEXTS[0], model=module.student)
    assert records(tmp_path / "d.jsonl")[0]["nats"] == pytest.approx(wanted[0], rel=1e-5)
    measured = {}
    for path, score in best.best_k_models.items():
        fresh = SFT(student=student())
        trainer(limit_val_batches=1.0).validate(
            fresh, datamodule=data, ckpt_path=path, weights_only=True, verbose=False
        )
        costs = [direct(text, model=fresh.student) for text in TEXTS]
        nats, _, size = map(sum, zip(*costs, strict=True))
        measured[path] = nats / math.log(2) / size
        assert score.item() == pytest.approx(measured[path], rel=1e-5)
    assert len(measured) == 2
    assert best.best_model_path == min(measured, key=measured.__getitem__)
    assert best.best_model_score.item() == pytest.approx(min(measured.values()), rel=1e-5)


def test_a_fit_without_validation_is_refused(tmp_path):
    data = DocumentData(tokenizer=TOKENIZER, train=rows())
    fit = trainer(max_steps=1, callbacks=[DocumentLikelihoods(str(tmp_path / "d.jsonl"))])
    with pytest.raises(ValueError, match="DocumentLikelihoods evaluates in validations, and this"):
        fit.fit(SFT(student=student()), datamodule=data)
    assert fit.global_step == 0


def test_two_that_would_write_one_file_are_refused(tmp_path):
    data = DocumentData(tokenizer=TOKENIZER, validation=rows())
    with pytest.raises(ValueError, match=r"two DocumentLikelihoods write .*d\.jsonl"):
        evaluated(data, *(DocumentLikelihoods(str(tmp_path / "d.jsonl")) for _ in range(2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "error"),
    [("validate", KeyboardInterrupt), ("test", ZeroDivisionError), ("fit", KeyboardInterrupt)],
)
def test_nothing_of_an_evaluation_that_was_broken_off_is_in_the_next(tmp_path, error, command):
    class BreaksOff(Callback):
        is_on = True

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if self.is_on and batch_idx == 1:
                raise error

        on_test_batch_end = on_validation_batch_end

    breaking, path = BreaksOff(), tmp_path / "d.jsonl"
    module = SupervisedKD(student=student(), teacher=student(1))
    callbacks = [
        CompletionSamples(3, metrics=[DistinctN()]),
        ExposureBias(max_new_tokens=3),
        DocumentLikelihoods(str(path)),
    ]
    data = DocumentData(
        tokenizer=TOKENIZER,
        **dict.fromkeys(("train", "validation", "test"), rows()),
        prompt_length=1,
        batch_size=2,
    )

    def run(*more):
        settings = {"max_steps": 1, "val_check_interval": 1, "limit_val_batches": 1.0}
        of = trainer(callbacks=[*callbacks, *more], **settings)
        getattr(of, command)(module, datamodule=data)

    def found(module):
        (numbers,) = trainer(callbacks=callbacks, limit_val_batches=1.0).validate(
            module, datamodule=data, verbose=False
        )
        return numbers, records(path)

    with pytest.raises((error, SystemExit)):
        run(breaking)
    after, module = found(module), SupervisedKD(student=module.student, teacher=student(1))
    assert after == found(module)


def test_windows_are_parts_of_documents_without_prompts():
    with pytest.raises(ValueError, match="truncation is windows and prompt_length 3"):
        DocumentData(tokenizer=TOKENIZER, truncation="windows", prompt_length=3)
    data = PromptCompletionData(
        tokenizer=TOKENIZER,
        validation=[{"prompt": "a", "completion": "b"}],
        truncation="windows",
    )
    with pytest.raises(ValueError, match="truncation is windows"):
        data.setup("validate")
