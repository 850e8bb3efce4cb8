from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_kd.data import train_tokenizer, write_tokenizer
from tests.support.toys import tiny_llama

TEXTS = ["the cat sat on the mat, the end", "two  spaces and a tab\t."]


def test_training_is_deterministic():
    first, second = (train_tokenizer(iter(TEXTS), 300).backend_tokenizer for _ in range(2))
    assert first.to_str() == second.to_str()
    assert train_tokenizer(["zebra zebra zebra"], 300).backend_tokenizer.to_str() != first.to_str()


@pytest.mark.parametrize(
    "text", ["na\u00efve\u00a0text", " lead", "don 't . , !", "a\t\n  b", "\U0001f469\u200d\u2122"]
)
def test_any_text_comes_back_as_it_was_from_the_saved_tokenizer(text, tmp_path):
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id}
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_frequent_words_become_one_token():
    tokenizer = train_tokenizer(["hello hello hello"], 300)
    assert len(tokenizer(" hello")["input_ids"]) == 1
    assert len(tokenizer("hero")["input_ids"]) > 1


def test_the_tokenizer_of_a_model_is_not_replaced(tmp_path):
    Path("text.txt").write_text("to be or not to be " * 20)
    tiny_llama(0).save_pretrained("model")
    before = {path: path.read_bytes() for path in Path("model").iterdir()}
    with pytest.raises(ValueError, match="there is a model in 'model'"):
        write_tokenizer(["text.txt"], "model", vocab_size=270)
    assert {path: path.read_bytes() for path in Path("model").iterdir()} == before
