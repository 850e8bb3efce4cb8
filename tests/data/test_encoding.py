import logging

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX
from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.data.collate import Collator
from lightning_kd.data.encoding import (
    Example,
    encode_completions,
    encode_documents,
)
from lightning_kd.data.limits import LengthLimit
from lightning_kd.tokenization import encode_prompts

EOS, PAD = 1, 0


def ids(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(list(text))


def test_completions_end_with_one_eos_and_prompts_with_none(tokenizer):
    assert encode_prompts(["ab"], tokenizer) == [ids(tokenizer, "ab")]
    both = encode_completions(["ab", ""], tokenizer)
    assert [c.ids for c in both] == [[*ids(tokenizer, "ab"), EOS], [EOS]]
    (cut,) = encode_completions(["a<eos>b"], tokenizer)
    assert cut.ids == [*ids(tokenizer, "a"), EOS]


def test_long_texts_are_tokenized_without_a_warning_that_they_reach_no_model(tokenizer, caplog):
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        encode_prompts(["abcdefgh"], tokenizer)
        encode_completions(["abcdefgh"], tokenizer)
        encode_documents(["abcdefgh"], tokenizer, add_eos=True)
        assert not caplog.messages
        tokenizer("abcdefgh")  # which transformers warns of
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


PROMPT, COMPLETION = [2, 3, 4, 5], [6, 7, 1]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (LengthLimit(7), (PROMPT, COMPLETION)),
        (LengthLimit(6, truncation="drop"), None),
        (LengthLimit(6, truncation="left"), ([3, 4, 5], COMPLETION)),
        (LengthLimit(9, 2, truncation="left"), ([4, 5], COMPLETION)),
        (LengthLimit(4, truncation="left"), ([5], COMPLETION)),
        (LengthLimit(3, truncation="left"), None),
        (LengthLimit(6, truncation="right"), (PROMPT, [6, 7])),
        (LengthLimit(9, 2, truncation="right"), ([2, 3], COMPLETION)),
        (LengthLimit(4, truncation="right"), (PROMPT, [])),
    ],
)
def test_truncation(limit, expected):
    assert limit.apply(PROMPT, COMPLETION, "row") == expected


def test_a_prompt_alone_is_within_its_own_limit():
    assert LengthLimit(4).apply(PROMPT, [], "row") == (PROMPT, [])
    assert LengthLimit(3, truncation="right").apply(PROMPT, [], "row") == ([2, 3, 4], [])


def test_too_long_is_an_error_unless_something_else_is_asked_for():
    with pytest.raises(ValueError, match=r"f:9: the prompt has 4 tokens and the completion 3"):
        LengthLimit(6).apply(PROMPT, COMPLETION, "f:9")
    with pytest.raises(ValueError, match="unknown truncation 'cut'"):
        LengthLimit(6, truncation="cut")
    with pytest.raises(ValueError, match="max_length is 0"):
        LengthLimit(0)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_the_first_eos_is_trained_on_also_where_pad_is_eos(pad):
    rows = [
        (20, 4, Example([2, 3, 6, EOS], 2, "ab", "e", {"teacher": "x"})),
        (21, 9, Example([5, EOS], 1, "d", "", {"teacher": "y"})),
    ]
    batch = Collator(pad)(rows)
    assert batch["input_ids"].tolist() == [[2, 3, 6, EOS], [5, EOS, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 6, EOS],
        [IGNORE_INDEX, EOS, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert batch["prompt_ids"].tolist() == [[2, 3], [pad, 5]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["row"].tolist() == [4, 9]
    assert batch["prompt"] == ["ab", "d"]
    assert batch["completion"] == ["e", ""]
    assert batch["sample"].tolist() == [20, 21]
    assert batch["extra"] == {"teacher": ["x", "y"]}


def test_nothing_of_filler_is_trained_on_and_packed_text_has_no_prompts():
    batch = Collator(PAD)([(0, 0, Example([2, 3])), (1, FILLER_ROW, Example([2, 3]))])
    assert batch["labels"].tolist() == [[2, 3], [IGNORE_INDEX] * 2]
    assert "prompt_ids" not in batch


def test_characters_that_become_padding_are_refused():
    """The arithmetic tokenizer has no token for what it does not know, and gives padding."""
    for encode in (encode_prompts, encode_completions):
        with pytest.raises(
            ValueError, match="does not know all characters of 'a dog', and gives <pad>"
        ):
            encode(["1+1=", "a dog"], arithmetic_tokenizer())


def test_a_tokenizer_may_pad_with_its_unknown_token():
    known = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, eos_token="<eos>", unk_token="<unk>", pad_token="<unk>"
    )
    assert encode_prompts(["a", "b"], tokenizer) == [[2], [0]]


def test_a_batch_has_prompts_only_if_every_row_has_one():
    with_prompt = Example([2, 3], prompt_length=1, prompt="a", completion="b")
    batch = Collator(PAD)([(0, 0, with_prompt), (1, 1, Example([2, 3, 4]))])
    assert "prompt_ids" not in batch
    assert batch["input_ids"].tolist() == [[2, 3, PAD], [2, 3, 4]]
