"""Training on a part of the documents."""

import json
from pathlib import Path

import pytest

from lightning_kd.data import DocumentData
from tests.support.toys import LETTERS, letter_tokenizer

TEXTS = [one + other for one in LETTERS[:5] for other in LETTERS[:5]]


def documents(split="train", **settings):
    """The documents of a split, as their tokens, in the order of the file."""
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    data = DocumentData(tokenizer=letter_tokenizer(), **{split: "texts.jsonl"}, **settings)
    rows = data.rows(split)
    return [tuple(rows.example(row, 0).input_ids) for row in range(len(rows))]


@pytest.mark.slow
def test_a_part_is_drawn_by_the_seed_and_lies_in_a_larger_one(monkeypatch):
    everything = documents()
    assert len(set(everything)) == len(TEXTS)
    drawn = {}
    for seed in range(20):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        small, large = documents(train_size=4), documents(train_size=12)
        assert len(set(small)) == 4
        assert len(set(large)) == 12
        assert set(small) < set(large) < set(everything)
        assert small == documents(train_size=4)
        assert documents(train_size=len(TEXTS)) == everything
        drawn[seed] = tuple(small)
    assert len(set(drawn.values())) == 20
    # No place in the file is left out for good.
    assert len(set().union(*drawn.values())) > 20


def test_other_splits_are_read_whole():
    assert documents("validation", train_size=4) == documents("validation")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "train_size is 0; give 1 or more"),
        (26, "train_size is 26 and data.train has 25 documents; give at most as many"),
    ],
)
def test_a_part_that_is_none_or_more_than_all_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        documents(train_size=size)
