"""Rows that ``predict`` wrote: the tokens are trained on as they were written, and so are ends."""

import json
from pathlib import Path

import pytest

from lightning_kd.data import PromptCompletionData
from lightning_kd.data.generated import tokenizer_fingerprint
from tests.support.toys import letter_tokenizer

EOS = 1


def written(*rows, name="written.jsonl", tokenizer=None):
    ours = tokenizer_fingerprint(tokenizer or letter_tokenizer())
    defaults = {"prompt": "ab", "completion": "cd", "prompt_ids": [2, 3], "completion_ids": [4, 1]}
    defaults |= {"ended": True, "tokenizer_fingerprint": ours}
    rows = [{k: v for k, v in (defaults | row).items() if v is not None} for row in rows]
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def examples(path, split="train", **settings):
    rows = PromptCompletionData(**({"tokenizer": letter_tokenizer(), split: path} | settings)).rows(
        split
    )
    return [rows.example(k, 0) for k in range(len(rows))]


def test_token_ids_are_taken_as_they_are_and_no_end_is_added():
    """The ids say other letters than the texts, which are not looked at."""
    path = written(
        {"completion_ids": [9, 9, EOS]},
        {"completion_ids": [9, 9], "ended": False},
        {"prompt_ids": [7], "completion_ids": [8]},
    )
    rows = examples(path, prompt_template="p{prompt}")
    assert [row.input_ids for row in rows] == [[2, 3, 9, 9, EOS], [2, 3, 9, 9], [7, 8]]
    assert [row.prompt_length for row in rows] == [2, 2, 1]
    assert rows[0].prompt == "ab"


def test_rows_without_these_columns_are_tokenized_and_ended_as_ever():
    none = dict.fromkeys(["prompt_ids", "completion_ids", "ended", "tokenizer_fingerprint"])
    path = written(none, {})
    rows = examples(path, prompt_template="p{prompt}")
    assert [row.input_ids for row in rows] == [[17, 2, 3, 4, 5, EOS], [2, 3, 4, EOS]]


def test_texts_are_tokenized_where_that_is_asked_for_but_no_end_is_taught_that_was_not_written():
    other = letter_tokenizer("zabcdefghijklmnop")
    path = written({}, {"ended": False}, {"ended": False, "completion": "c<eos>"})
    rows = examples(path, tokenizer=other, use_token_ids=False, prompt_template="p{prompt}")
    assert [row.input_ids for row in rows] == [[3, 4, 5, 6, EOS], [3, 4, 5, 6], [3, 4, 5, EOS]]


def test_a_column_says_which_completions_ended_also_without_ids():
    none = dict.fromkeys(["prompt_ids", "completion_ids", "tokenizer_fingerprint"])
    path = written(none | {"ended": False}, none)
    assert [row.input_ids for row in examples(path)] == [[2, 3, 4, 5], [2, 3, 4, 5, EOS]]
    assert [row.input_ids for row in examples(path, ended_column=None)] == [[2, 3, 4, 5, EOS]] * 2
    path = written(none | {"ended": None, "complete": False})
    assert examples(path, ended_column="complete")[0].input_ids == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion_ids": [4, 99]}, "column 'completion_ids' has 99, .* go from 0 to 17"),
        ({"completion_ids": [4, -1]}, "has -1, which is no token"),
        ({"prompt_ids": ["a"]}, "column 'prompt_ids' has 'a', which is no token"),
        ({"prompt_ids": [True]}, "has True, which is no token"),
        ({"completion_ids": [3, EOS, 4, EOS]}, "has the EOS, 1, as number 2 of its 4 tokens"),
        ({"completion_ids": [4, EOS, EOS]}, "has the EOS, 1, as number 2 of its 3 tokens"),
        ({"completion_ids": "4 1"}, "column 'completion_ids' must be a list"),
        ({"ended": "yes"}, "column 'ended' must be true or false, got str 'yes'"),
        ({"tokenizer_fingerprint": "0123"}, "but of tokenizer 0123, and data.tokenizer is .*false"),
        ({"tokenizer_fingerprint": None}, "but of no tokenizer_fingerprint, .*use_token_ids"),
        ({"completion_ids": [], "ended": False}, "the completion has no tokens and did not end"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(row, message):
    path = written({}, row)
    with pytest.raises(ValueError, match=rf"written\.jsonl:2: .*{message}"):
        examples(path)


def test_ids_of_another_tokenizer_are_refused_though_they_would_fit():
    other = letter_tokenizer("bacdefghijklmnop")
    assert len(other) == len(letter_tokenizer())
    path = written({}, tokenizer=other)
    with pytest.raises(ValueError, match="they may stand for other tokens"):
        examples(path)
    assert [row.input_ids for row in examples(path, tokenizer=other)] == [[2, 3, 4, EOS]]


def test_prompts_are_read_again_as_they_were():
    path = written({"prompt_ids": [9, 9]})
    (row,) = examples(path, "predict", prompt_template="p{prompt}")
    assert (row.input_ids, row.prompt, row.completion) == ([9, 9], "ab", "cd")
    assert examples(path, completion_column=None)[0].input_ids == [9, 9]
