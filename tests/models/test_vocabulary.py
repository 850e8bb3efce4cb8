import pytest
import torch

from lightning_kd.models import shared_vocabulary
from lightning_kd.teachers import LocalTeacher
from lightning_kd.tokenization import load_tokenizer
from tests.support.toys import letter_tokenizer, tiny_llama

CPU = torch.device("cpu")


def saved_teacher(path, letters, **settings):
    tiny_llama(vocab_size=len(letters) + 2, **settings).save_pretrained(path)
    letter_tokenizer(letters).save_pretrained(path)
    return LocalTeacher(str(path))


def test_equal_tokenizers_pass(tokenizer, tmp_path):
    teacher = saved_teacher(tmp_path / "t", "abcdefghijklmnop")
    teacher.prepare(tokenizer, CPU, "equal")
    assert teacher.vocabulary_size == 18


@pytest.mark.parametrize("policy", ["equal", "shared"])
def test_other_ids_are_refused_under_every_policy(tokenizer, tmp_path, policy):
    teacher = saved_teacher(tmp_path / "t", "ponmlkjihgfedcba")
    with pytest.raises(ValueError, match="'a' is 2 in the data and 17 in the teacher"):
        teacher.prepare(tokenizer, CPU, policy)


def test_further_tokens_pass_where_the_vocabulary_is_shared(tokenizer, tmp_path):
    teacher = saved_teacher(tmp_path / "t", "abcdefghijklmnopqrs")
    with pytest.raises(ValueError, match=r"3 tokens are in one of them only \(18 and 21 tokens\)"):
        teacher.prepare(tokenizer, CPU, "equal")
    saved_teacher(tmp_path / "u", "abcdefghijklmnopqrs").prepare(tokenizer, CPU, "shared")


def test_weights_without_a_tokenizer_pass(tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "t")
    LocalTeacher(str(tmp_path / "t")).prepare(tokenizer, CPU, "equal")


def test_unequal_widths_name_both_sizes():
    with pytest.raises(ValueError, match="151936 logits, the teacher 152064"):
        shared_vocabulary(151_936, 152_064, "equal")
    assert shared_vocabulary(152_064, 151_936, "shared") == 151_936


def test_a_missing_tokenizer_is_named():
    with pytest.raises(ValueError, match=r"tokenizer directory '\./nowhere' does not exist"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="cannot load the tokenizer 'not-on-this-machine'"):
        load_tokenizer("not-on-this-machine")
