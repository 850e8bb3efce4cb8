"""Keys of rows: the same text is the same row, wherever it stands."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.cache import row_keys
from lightning_kd.scoring import ScoredPositions

TEXTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=4)
    ).filter(lambda pair: pair[0] or pair[1]),
    min_size=1,
    max_size=6,
)


def keys_of(texts, extra_padding=0, padding=0):
    width = max(len(p) + len(c) for p, c in texts) + extra_padding
    ids = torch.full((len(texts), width), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(texts):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return row_keys(batch, ScoredPositions.from_labels(labels))


@settings(deadline=None)
@given(TEXTS, st.integers(0, 3), st.integers(0, 9))
def test_a_key_is_of_tokens_and_scored_positions_and_of_nothing_else(texts, extra, padding):
    keys = keys_of(texts, extra, padding)
    assert keys == [key for text in texts for key in keys_of([text])]
    scored = [len(c) - (not p) > 0 for p, c in texts]
    assert [key is not None for key in keys] == scored
    known = {}
    for (prompt, completion), key in zip(texts, keys, strict=True):
        first = max(len(prompt), 1)
        if key is not None:
            assert known.setdefault(key, ([*prompt, *completion], first)) == (
                [*prompt, *completion],
                first,
            )


def test_the_hash_is_of_64_bit_ids_and_a_bit_for_each_position():
    """So that files stay readable whatever dtype and machine a later batch has."""
    (key,) = keys_of([([5], [6, 7])])
    ids = b"".join(token.to_bytes(8, "little") for token in (5, 6, 7))
    assert key == hashlib.blake2b(ids + bytes([0b11000000]), digest_size=16).digest()


COLUMNS = {"teacher": ["a", "b", "a", 1, "1"], "level": [1, 1, 2, 1, 1]}


def keys_by(columns):
    ids = torch.tensor([[5, 6, 7]] * 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "extra": COLUMNS}
    return row_keys(batch, ScoredPositions.from_labels(ids), columns)


@pytest.mark.parametrize(
    ("columns", "same"),
    [
        ((), [0, 0, 0, 0, 0]),
        (("teacher",), [0, 1, 0, 3, 4]),
        (("level",), [0, 0, 2, 0, 0]),
        (("level", "teacher"), [0, 1, 2, 3, 4]),
    ],
)
def test_a_text_is_known_by_further_columns_too(columns, same):
    keys = keys_by(columns)
    assert [keys.index(key) for key in keys] == same
    assert keys_by(columns[::-1]) == keys


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no column 'judge'.*extra_columns \(there are \['level'"):
        keys_by(("judge",))
