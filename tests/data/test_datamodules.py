import json
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.data import (
    ArithmeticData,
    ChatData,
    PackedTextData,
    PromptCompletionData,
    RolloutPlan,
    arithmetic_tokenizer,
    train_tokenizer,
)
from lightning_kd.tokenization import load_tokenizer
from tests.support.harness import trainer
from tests.support.toys import letter_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class Watch(L.LightningModule):
    """Trains one number and writes down the rows it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["row"].tolist())
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        raise AssertionError("there is no validation data")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    def __init__(self, position, path):
        self.position, self.path = position, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.train_dataloader.position == self.position:
            trainer.save_checkpoint(self.path)


def jsonl(*rows, name="rows.jsonl"):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return name


def letters(count):
    return [{"prompt": "ab"[: 1 + k % 2], "completion": "cdefgh"[: k % 6]} for k in range(count)]


def ten_rows():
    return jsonl(*letters(10), name="ten.jsonl")


def data(**settings):
    defaults = {"tokenizer": letter_tokenizer(), "train": ten_rows(), "batch_size": 3}
    return PromptCompletionData(**(defaults | settings))


def test_prompts_alone_have_nothing_to_train_on():
    path = jsonl({"prompt": "bc", "completion": "de", "source": "x"})
    example = (
        data(train=path, completion_column=None, extra_columns=["source"])
        .rows("train")
        .example(0, 0)
    )
    assert (len(example.input_ids), example.prompt_length) == (2, 2)
    assert (example.prompt, example.completion, example.extra) == ("bc", "", {"source": "x"})
    with pytest.raises(ValueError, match="topic"):
        data(train=path, extra_columns=["topic"]).rows("train")


def test_prompt_template_columns_and_labels():
    path = jsonl({"question": "b{prompt}", "answer": "cd"})
    module = data(
        train=path,
        prompt_column="question",
        completion_column="answer",
        prompt_template="a{prompt}a",
        tokenizer=letter_tokenizer("abcdefghijklmnopqrstuvwxyz{}"),
    )
    example = module.rows("train").example(0, 0)
    assert example.prompt == "ab{prompt}a"
    assert module.tokenizer.decode(example.input_ids[: example.prompt_length]).replace(" ", "") == (
        "ab{prompt}a"
    )
    assert len(example.input_ids) == example.prompt_length + 3


def test_what_was_dropped_and_cut_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        rows = data(max_length=5, truncation="drop").rows("train")
    too_long = sum(len(r["prompt"]) + len(r["completion"]) + 1 > 5 for r in letters(10))
    assert too_long > 0
    assert (rows.dropped, rows.cut, len(rows)) == (too_long, 0, 10 - too_long)
    assert f"of 10 rows, {too_long} were dropped and 0 cut" in caplog.text
    cut = data(max_length=5, truncation="right").rows("train")
    assert (cut.dropped, cut.cut, len(cut)) == (0, too_long, 10)
    assert all(len(cut.example(row, 0).input_ids) <= 5 for row in range(10))
    with pytest.raises(ValueError, match="all 10 rows are longer"):
        data(max_length=1, truncation="drop").rows("train")


def test_predict_does_without_completions_and_does_not_count_them_in_the_limit():
    path = jsonl({"prompt": "ab", "completion": "c" * 50}, {"prompt": "a", "completion": "d"})
    rows = data(predict=path, max_length=4).rows("predict")
    assert [rows.example(k, 0).input_ids for k in range(2)] == [[2, 3], [2]]
    assert rows.example(1, 0).completion == "d"
    assert data(predict=jsonl({"prompt": "ab"})).rows("predict").example(0, 0).completion == ""


def test_chats():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    module = ChatData(tokenizer=tokenizer, train=jsonl({"messages": messages}))
    example = module.rows("train").example(0, 0)
    assert (example.input_ids, example.prompt_length) == ([2, 3, 4, 1], 2)
    assert (example.prompt, example.completion) == ("ab", "c")


@pytest.mark.slow
def test_chats_need_not_be_alike_and_each_names_its_line():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] ~ m['name'] }}{% endfor %}"
    ask, tell = {"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}
    # More rows of one kind than a table looks at before it decides on its columns.
    plain = [{"messages": [ask, tell]}] * 2500
    path = jsonl(*plain, {"messages": [ask | {"name": "b"}, tell]})
    rows = ChatData(tokenizer=tokenizer, train=path).rows("train")
    assert [rows.example(k, 0).prompt for k in (0, 2500)] == ["a", "ab"]
    path = jsonl(*plain, {"messages": [ask | {"content": 5}, tell]}, name="wrong.jsonl")
    with pytest.raises(ValueError, match=r"wrong\.jsonl:2501: a message needs role and content"):
        ChatData(tokenizer=tokenizer, train=path).rows("train")


def test_evaluation_sees_each_row_once_and_pads_with_eos_where_there_is_no_pad():
    class Look(Watch):
        def test_step(self, batch, batch_idx):
            self.seen.append((batch["row"].tolist(), batch["input_ids"][:, -1].tolist()))
            assert (batch["labels"] == 1).sum(-1).tolist() == [1] * len(batch["row"])

    tokenizer = letter_tokenizer()
    tokenizer.pad_token = None
    module = Look()
    trainer().test(module, datamodule=data(tokenizer=tokenizer, test=ten_rows(), eval_batch_size=4))
    assert module.seen == [([0, 1, 2, 3], [1] * 4), ([4, 5, 6, 7], [1] * 4), ([8, 9], [1] * 2)]


def test_packed_blocks_start_elsewhere_in_each_pass_and_eos_ends_documents():
    path = jsonl({"text": "abcdefgh"}, {"text": "ijklmnop"})
    module = PackedTextData(
        tokenizer=letter_tokenizer(), train=path, validation=path, block_length=4
    )
    whole = [*range(2, 10), 1, *range(10, 18), 1]
    train, validation = module.rows("train"), module.rows("validation")
    assert [validation.example(k, 0).input_ids for k in range(4)] == [
        whole[4 * k : 4 * k + 4] for k in range(4)
    ]
    assert len(train) == 3
    starts = set()
    for pass_ in range(20):
        first = train.example(0, pass_).input_ids
        (start,) = [s for s in range(4) if whole[s : s + 4] == first]
        starts.add(start)
        joined = [t for k in range(3) for t in train.example(k, pass_).input_ids]
        assert joined == whole[start : start + 12]
    assert starts == {0, 1, 2, 3}
    assert train.example(0, 0).prompt_length == 0
    with pytest.raises(ValueError, match="too few for blocks of 12"):
        PackedTextData(tokenizer=letter_tokenizer(), train=path, block_length=12).rows("train")


@pytest.mark.slow
def test_real_text_packs(shared_data):
    path = str(shared_data / "tinyshakespeare" / "input.txt")
    text = Path(path).read_text()
    tokenizer = train_tokenizer([text[:100_000]], vocab_size=512)
    module = PackedTextData(tokenizer=tokenizer, train=path, validation=path, block_length=128)
    rows = module.rows("validation")
    ids = [t for k in range(len(rows)) for t in rows.example(k, 0).input_ids]
    assert text.startswith(tokenizer.decode(ids))
    assert len(text) - len(tokenizer.decode(ids)) < 1000


def test_epochs_are_passes_that_end_with_an_optimizer_step():
    module = Watch()
    fit = trainer(max_epochs=3, max_steps=-1, accumulate_grad_batches=2)
    fit.fit(module, datamodule=data(batch_size=2))
    # Passes of 10 rows are complete in the third, the fifth and the eighth step of 4 rows.
    assert fit.global_step == fit.estimated_stepping_batches == 8
    # What the progress bar counts to in the last epoch.
    assert (fit.current_epoch, fit.num_training_batches) == (3, 6)
    rows = [row for batch in module.seen for row in batch]
    assert len(rows) == 32
    for pass_ in range(3):
        assert sorted(rows[10 * pass_ : 10 * pass_ + 10]) == list(range(10))


def test_a_resumed_run_sees_the_rest_of_the_rows(tmp_path):
    whole, rest = Watch(), Watch()
    path = tmp_path / "middle.ckpt"
    settings = {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 2}
    trainer(**settings, callbacks=[SaveAfter(4, path)]).fit(whole, datamodule=data())
    trainer(**settings).fit(rest, datamodule=data(), ckpt_path=path, weights_only=True)
    assert len(whole.seen) == 12
    assert rest.seen == whole.seen[4:]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"was not given data\.train"):
        trainer(max_steps=1).fit(Watch(), datamodule=data(train=None))
    with pytest.raises(ValueError, match="one pass is 4 optimizer steps"):
        trainer(max_steps=-1, max_epochs=-1).fit(Watch(), datamodule=data())
    with pytest.raises(ValueError, match="batch_size is 0"):
        data(batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        data(num_workers=-1)
    for name in ("batch_size", "eval_batch_size"):
        with pytest.raises(ValueError, match=f"{name} (is )?1000000000.* at most 65,536"):
            data(**{name: 10**9})
    with pytest.raises(ValueError, match=r"num_workers is 100000; .* at most 1,024"):
        data(num_workers=100_000)
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"worker_timeout is {value}; .* above 0"):
            data(worker_timeout=value)
    with pytest.raises(
        ValueError, match=r"a window has 1000000000 micro-batches .* at most 65,536"
    ):
        RolloutPlan(micro_batches=10**9)
    with pytest.raises(ValueError, match=r"no validation rows: .* setup was not called"):
        data().val_dataloader()
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: the prompt has no tokens"):
        data(train=jsonl({"prompt": "", "completion": "a"}, name="empty.jsonl")).rows("train")
    with pytest.raises(ValueError, match="lacks the place of"):
        data(prompt_template="Question:")
    with pytest.raises(ValueError, match=r"tokenizer directory '\./none' does not exist"):
        data(tokenizer="./none").rows("train")
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        data(tokenizer=tokenizer).rows("train")


def read(digits_first_low):
    return int(digits_first_low[::-1])


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_arithmetic_is_right_disjoint_and_deterministic(digits):
    sizes = {"train_size": 30, "validation_size": 10, "test_size": 10}
    splits = {}
    for split in ("train", "validation", "test"):
        rows = ArithmeticData(digits=digits, **sizes).rows(split)
        examples = [rows.example(k, 0) for k in range(len(rows))]
        for example in examples:
            first, second = example.prompt.removesuffix("=").split("+")
            assert len(first) == len(second) == digits
            assert read(example.completion) == read(first) + read(second)
            assert len(example.completion) == digits + 1
        splits[split] = [example.prompt for example in examples]
    assert len({p for prompts in splits.values() for p in prompts}) == 50
    again = ArithmeticData(digits=digits, **sizes | {"train_size": 20}).rows("train")
    assert [again.example(k, 0).prompt for k in range(20)] == splits["train"][:20]


def test_arithmetic_tokens_are_those_of_its_tokenizer_saved_and_loaded(tmp_path):
    arithmetic_tokenizer().save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    example = ArithmeticData(tokenizer=loaded).rows("test").example(0, 0)
    text = example.prompt + example.completion
    assert loaded(text)["input_ids"] == example.input_ids[:-1]
    assert loaded.decode(example.input_ids, skip_special_tokens=True) == text
    assert example.input_ids[-1] == loaded.eos_token_id


def test_label_noise_is_one_wrong_digit_in_its_share_of_the_training_answers():
    def answers(noise, split="train"):
        rows = ArithmeticData(train_size=2000, label_noise=noise).rows(split)
        return [rows.example(k, 0) for k in range(1000)]

    wrong = [
        sum(a != b for a, b in zip(clean.completion, noisy.completion, strict=True))
        for clean, noisy in zip(answers(0.0), answers(0.3), strict=True)
    ]
    assert set(wrong) == {0, 1}
    assert 250 < sum(wrong) < 350
    assert answers(0.3) == answers(0.3)
    assert answers(0.3, "validation") == answers(0.0, "validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"digits": 4}, "digits is 4"),
        ({"digits": 1, "train_size": 1}, "together at most 100"),
        ({"train_size": 0}, "must be 1 or more"),
    ],
)
def test_impossible_sums_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticData(**arguments)


@pytest.mark.slow
def test_gsm8k_loads_at_its_real_lengths(shared_data):
    path = shared_data / "gsm8k" / "train.jsonl"
    lines = path.read_text().splitlines()[:500]
    tokenizer = train_tokenizer(lines, vocab_size=600)
    rows = PromptCompletionData(
        tokenizer=tokenizer,
        train=str(path),
        prompt_column="question",
        completion_column="answer",
        max_length=4096,
    ).rows("train")
    assert len(rows) == 7473
    expected = json.loads(lines[3])
    example = rows.example(3, 0)
    assert example.prompt == expected["question"]
    written = tokenizer.decode(example.input_ids[example.prompt_length :])
    assert written == expected["answer"] + tokenizer.eos_token


def test_a_tokenizer_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="need 258"):
        train_tokenizer(["a"], vocab_size=100)
