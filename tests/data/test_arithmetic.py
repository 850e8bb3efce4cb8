import hashlib

import pytest

from lightning_kd.data import ArithmeticData
from tests.support.toys import letter_tokenizer


@pytest.mark.parametrize(
    ("split", "first", "digest"),
    [
        ("train", "105+641=7460", "9f95453fc4e52a70"),
        ("validation", "121+158=2790", "7655a321a626cffb"),
        ("test", "631+440=0810", "ea140668c16bdf34"),
    ],
)
def test_the_problems_are_the_same_ones_for_ever(split, first, digest):
    rows = ArithmeticData(train_size=30, validation_size=10, test_size=10).rows(split)
    examples = [rows.example(k, 0) for k in range(len(rows))]
    text = "\n".join(f"{example.prompt}{example.completion}" for example in examples)
    assert text.splitlines()[0] == first
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_problems_do_not_depend_on_the_seed_of_the_run(seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    assert ArithmeticData().rows("test").example(1, 0).prompt == "052+687="


def test_a_tokenizer_without_the_signs_is_refused():
    signs = "0123456789+"
    with pytest.raises(ValueError, match="no token for =; sums need"):
        ArithmeticData(tokenizer=letter_tokenizer(signs)).rows("test")
    unknown = letter_tokenizer(signs)
    unknown.unk_token = "<pad>"
    with pytest.raises(ValueError, match="no token for =; sums need"):
        ArithmeticData(tokenizer=unknown).rows("test")
