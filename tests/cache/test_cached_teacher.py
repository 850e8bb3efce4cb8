"""What a teacher on disk refuses, and by what name."""

import json

import pytest
import torch

from lightning_kd.cache_writing import CacheOptions, write_cache
from lightning_kd.data import DocumentData, PackedTextData, PromptCompletionData
from lightning_kd.models import DenseLogits
from lightning_kd.modules import SFT, BabyLlama, OnPolicyDistillation
from lightning_kd.resuming import describe, differences
from lightning_kd.teachers import CachedTeacher, LocalTeacher
from tests.support.caches import fitted, method, written
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return written(tmp_path_factory.mktemp("caches") / "cache")


def texts(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count):
    letters = "abcdefghijklmnop"
    return [
        {
            "prompt": letters[n % 9 : n % 9 + 2],
            "completion": letters[n % 7 : n % 7 + 3] + letters[n],
        }
        for n in range(count)
    ]


def from_file(path, rows, **options):
    given = {"tokenizer": letter_tokenizer(), "batch_size": 2} | options
    return PromptCompletionData(train=texts(path, rows), **given)


def fit(cache, data, **settings):
    return fitted(method(CachedTeacher(str(cache))), data, max_steps=2, **settings)


def test_another_tokenizer_and_another_template_are_refused(cache):
    teacher = CachedTeacher(str(cache))
    with pytest.raises(ValueError, match=r"another tokenizer, or another chat template"):
        teacher.prepare(letter_tokenizer("ponmlkjihgfedcba"), torch.device("cpu"), "equal")
    templated = letter_tokenizer()
    templated.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"another tokenizer, or another chat template"):
        teacher.prepare(templated, torch.device("cpu"), "equal")


def test_rows_in_another_order_are_the_same_rows(tmp_path):
    rows = pairs(10)
    cache = written(tmp_path / "cache", data=from_file(tmp_path / "rows.jsonl", rows))
    fit(cache, from_file(tmp_path / "reversed.jsonl", rows[::-1]))
    fit(cache, from_file(tmp_path / "some.jsonl", rows[3:7]))


def test_a_changed_row_is_named_by_its_number_and_text_before_the_first_step(tmp_path):
    rows = pairs(10)
    cache = written(tmp_path / "cache", data=from_file(tmp_path / "rows.jsonl", rows))
    rows[6]["completion"] = "ponm"
    with pytest.raises(ValueError, match=r"data.train: row 6 \('.*ponm'\) is not in the cache"):
        fit(cache, from_file(tmp_path / "changed.jsonl", rows))


class Overflows(LocalTeacher):
    """A model whose states are no numbers where a text has a letter."""

    LETTER = letter_tokenizer().convert_tokens_to_ids("p")

    def answer(self, batch, positions, **options):
        answer = super().answer(batch, positions, **options)
        with_letter = (batch["input_ids"] == self.LETTER).any(-1)[positions.rows]
        for states, _ in answer.logits[0].factors:
            states[with_letter, 1] = torch.nan
        return answer


@pytest.mark.parametrize("kept", [{}, {"kind": "top_k", "k": 3}, {"kind": "sampled", "draws": 3}])
def test_what_is_no_number_is_refused_by_its_row_while_it_is_written(kept, tmp_path):
    rows = pairs(10)
    rows[6]["completion"] = "po"
    train, validation = (
        texts(tmp_path / f"{n}.jsonl", some) for n, some in enumerate([rows[:6], rows])
    )
    data = PromptCompletionData(
        train=train, validation=validation, tokenizer=letter_tokenizer(), batch_size=2
    )
    module = method(Overflows.of(tiny_llama(2)))
    with pytest.raises(ValueError, match=r"says nan about row 6 of data.validation .* stay"):
        written(tmp_path / "cache", module, data, **kept)
    with pytest.raises(ValueError, match="is incomplete"):
        CachedTeacher(str(tmp_path / "cache"))
    assert {shard.suffix for shard in (tmp_path / "cache").glob("shard-*")} == {".safetensors"}


def test_rows_that_repeat_a_text_are_counted(tmp_path, caplog):
    rows = pairs(4)
    with caplog.at_level("INFO"):
        written(tmp_path / "cache", data=from_file(tmp_path / "rows.jsonl", [*rows, *rows[1:]]))
    assert "4 texts with" in caplog.text
    assert "3 rows repeat a text" in caplog.text


def test_another_prompt_template_is_named(tmp_path):
    rows = pairs(6)
    cache = written(tmp_path / "cache", data=from_file(tmp_path / "rows.jsonl", rows))
    data = from_file(tmp_path / "rows.jsonl", rows, prompt_template="a{prompt}")
    with pytest.raises(
        ValueError, match=r"other options of the data: prompt_template: \{prompt\} ->"
    ):
        fit(cache, data)


def test_a_validation_split_that_is_not_in_the_cache_is_named(tmp_path):
    cache = written(tmp_path / "cache", data=Letters(8, batch_size=2), splits=["train"])
    fit(cache, Letters(8, batch_size=2))
    rows = {"train": pairs(4), "validation": pairs(6)}
    paths = {split: texts(tmp_path / f"{split}.jsonl", some) for split, some in rows.items()}
    data = PromptCompletionData(**paths, tokenizer=letter_tokenizer(), batch_size=2)
    both = written(tmp_path / "both", data=data, splits=["train"])
    with pytest.raises(ValueError, match=r"data.validation: row 4 .* is not in the cache"):
        fit(both, data, limit_val_batches=1)


def test_rows_of_a_users_own_data_module_are_refused_when_they_come(cache):
    batches = [ragged_batch([(2, 5), (3, 2)])]
    with pytest.raises(ValueError, match=r"row 0 \('m p f a d l d'\) is not in the cache"):
        fit(cache, BatchList(batches))


def test_packed_text_at_random_offsets_is_refused_and_documents_and_fixed_offsets_are_not(tmp_path):
    path = texts(tmp_path / "text.jsonl", [{"text": "abcdefghijklmnop" * 3}] * 4)
    given = {"train": path, "tokenizer": letter_tokenizer(), "batch_size": 2}
    packed = PackedTextData(block_length=8, **given)
    with pytest.raises(ValueError, match=r"random offsets.*DocumentData, or data.offsets: fixed"):
        written(tmp_path / "cache", data=packed)
    module = method(LocalTeacher.of(tiny_llama(2)), BabyLlama, kl_scale="batchmean")
    for name, data in {
        "fixed": PackedTextData(block_length=8, offsets="fixed", **given),
        "documents": DocumentData(**given),
    }.items():
        cache = written(tmp_path / name, module, data)
        teacher = CachedTeacher(str(cache))
        fitted(method(teacher, BabyLlama, kl_scale="batchmean"), data, max_steps=2)
    with pytest.raises(ValueError, match=r"data.train: .*random offsets"):
        fit(cache, packed)


def test_other_scored_positions_are_other_rows(cache):
    module = method(CachedTeacher(str(cache)), BabyLlama, kl_scale="batchmean")
    with pytest.raises(ValueError, match=r"or other tokens of it are scored"):
        fitted(module, Letters(40, batch_size=2), max_steps=1)


@pytest.mark.slow
def test_an_incomplete_cache_is_refused_when_the_teacher_is_made(tmp_path):
    module, data = method(LocalTeacher.of(tiny_llama(2))), Letters(40, batch_size=2)
    options = CacheOptions(str(tmp_path / "cache"), shard_megabytes=1e-3)
    answer, calls = module.teacher.answer, []

    def answers_for_a_while(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return answer(*arguments, **keywords)

    module.teacher.answer = answers_for_a_while
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        write_cache(trainer(), module, data, options)
    with pytest.raises(ValueError, match=r"is incomplete.*lightning-kd cache again"):
        CachedTeacher(options.dirpath)
    whole = written(tmp_path / "whole", method(LocalTeacher.of(tiny_llama(2))), data)
    written(tmp_path / "cache", method(LocalTeacher.of(tiny_llama(2))), data)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()
    }


def test_another_teacher_continues_no_cache_and_no_run(cache, tmp_path):
    with pytest.raises(ValueError, match=r"something else: .*weights"):
        written(cache, method(LocalTeacher.of(tiny_llama(3))))
    other = CachedTeacher(str(written(tmp_path / "other", method(LocalTeacher.of(tiny_llama(3))))))
    (difference,) = differences(describe(CachedTeacher(str(cache))), describe(other))
    assert "weights" in difference
    moved = cache.rename(tmp_path / "moved")
    same = CachedTeacher(str(moved))
    moved.rename(cache)
    assert describe(same) == describe(CachedTeacher(str(cache)))


def test_whole_logits_cannot_be_kept(tmp_path):
    module = method(LocalTeacher.of(tiny_llama(2)), logits_backend=DenseLogits())
    with pytest.raises(ValueError, match=r"MaterializedLogits.*FusedLogits"):
        written(tmp_path / "cache", module)


def test_methods_data_and_trainers_that_make_no_cache_are_refused(tmp_path):
    module, data = method(LocalTeacher.of(tiny_llama(2))), Letters(8, batch_size=2)
    options = CacheOptions(str(tmp_path / "cache"))
    student = SFT(student=module.student_spec)
    with pytest.raises(ValueError, match=r"SFT has none; take a method with a teacher"):
        write_cache(trainer(), student, data, options)
    own = method(LocalTeacher.of(tiny_llama(2)), OnPolicyDistillation)
    with pytest.raises(ValueError, match=r"OnPolicyDistillation asks.*generates on the way"):
        write_cache(trainer(), own, data, options)
    with pytest.raises(ValueError, match=r"BatchList.*DistillationData"):
        write_cache(trainer(), module, BatchList([]), options)
    with pytest.raises(ValueError, match=r"leaves rows out"):
        write_cache(trainer(limit_predict_batches=1), module, data, options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "top_k", "k": "8"}, "cache.k is '8', of type str; give a whole number"),
        ({"splits": []}, r"splits is \[\]; name some of train, validation, test"),
        ({"splits": ["train", "train"]}, r"each once"),
        ({"splits": ["predict"]}, r"splits is \['predict'\]"),
        ({"shard_megabytes": 0.0}, r"shard_megabytes is 0.0; it must be positive"),
        ({"kind": "logits"}, r"unknown kind of cache 'logits'; choose one of hidden"),
        ({"k": 4}, r"kind: hidden has no option k; leave it out"),
        ({"kind": "sampled", "temperatures": [2.0]}, r"kind: sampled has no option temperatures"),
        ({"kind": "sampled", "draws": 0}, r"draws is 0 and k 0; they must be at least 1 and 0"),
        ({"kind": "top_k", "k": 0}, r"k is 0; it must be 1 or more"),
        ({"kind": "top_k", "temperatures": [0.0]}, r"temperatures are \[0.0\]"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        CacheOptions("cache", **options)
