"""Rows in the tokens of another tokenizer: prompts, completions and special tokens."""

from copy import deepcopy

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from lightning_kd.alignment import Retokenizer, counterparts
from lightning_kd.data.encoding import encode_documents
from lightning_kd.token_bytes import TokenBytes
from lightning_kd.tokenization import encode_prompts, padding_id
from tests.support.tokenizers import KINDS, byte_level, tokenizer_of_kind
from tests.support.toys import fused_letter_tokenizer

BYTE_LEVEL, LLAMA = "byte-level BPE", "SentencePiece BPE with byte fallback"


def both(student, teacher):
    return tokenizer_of_kind(student), tokenizer_of_kind(teacher)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def adds_space(tokenizer):
    """Whether it writes "and" as behind a space."""
    return plain(tokenizer, "and") == plain(tokenizer, "two and")[len(plain(tokenizer, "two")) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [True, False])
def test_one_tokenizer_on_both_sides_has_a_token_for_each_token(kind, apart):
    """Where the student's prompt and completion are tokenized as the teacher tokenizes them."""
    own, other = both(kind, kind)
    prompt, completion = "two and two", "were four." if apart else " were four."
    ids = [*encode_prompts([prompt], own)[0], *plain(own, completion), own.eos_token_id]
    start = len(encode_prompts([prompt], own)[0])
    if not apart:
        ids = [*encode_documents([prompt + completion], own, add_eos=True)[0]]
        start = 3
    row = Retokenizer(own, other).row(ids, start, prompt=prompt if apart else None, apart=apart)
    assert row.ids == ids
    assert row.start == start
    assert row.chunks.first == row.chunks.second == list(range(len(ids) - start))


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_a_prompt_and_its_completion_are_read_as_the_teachers_own_would_be(student, teacher):
    own, other = both(student, teacher)
    prompt, completion = "two and", "two were four"
    ids = [*encode_prompts([prompt], own)[0], *plain(own, completion), own.eos_token_id]
    start = len(ids) - len(plain(own, completion)) - 1
    row = Retokenizer(own, other).row(ids, start, prompt=prompt, apart=True)
    before = encode_prompts([prompt], other)[0]
    assert row.ids[: row.start] == before
    assert row.ids[-1] == other.eos_token_id
    if adds_space(own) or not adds_space(other):
        assert row.ids == [*before, *plain(other, completion), other.eos_token_id]
    else:  # the space is nobody's
        behind = [*plain(other, "a"), *row.ids[row.start : -1]]
        assert other.decode(behind).lstrip() == "a" + completion
    assert row.chunks.first[-1] == row.chunks.second[-1] == row.chunks.count - 1


@pytest.mark.parametrize("teacher", [BYTE_LEVEL, LLAMA, "Unigram with byte fallback"])
def test_a_document_goes_on_in_the_middle_of_a_word(teacher):
    """The word that both parts share is cut there on the other side too."""
    own, other = both("byte-level BPE with a prefix space", teacher)
    text = "The teacher reads the text"
    ids = [*plain(own, text), own.eos_token_id]
    pieces = own.convert_ids_to_tokens(ids)
    start = next(k for k in range(2, len(ids)) if not pieces[k].startswith("Ġ"))
    row = Retokenizer(own, other).row(ids, start)
    assert -1 not in row.chunks.first + row.chunks.second
    assert other.decode(row.ids, skip_special_tokens=True).strip() == text
    size = sum(map(len, TokenBytes.of_tokenizer(own).of_row(ids)[start:]))
    behind = other.decode(row.ids[row.start : -1])
    assert behind.strip() == text[len(text) - size :].strip()


def test_a_token_has_a_part_in_the_chunk_that_it_ends():
    """The teacher joins b with what follows, and a with nothing: behind a alone an end is certain."""
    own = byte_level(261, texts=["a"])  # a token for each byte
    other = byte_level(263, texts=["ba bb", "bb", "ba"] * 5)
    row = Retokenizer(own, other).row([*plain(own, "aabab"), own.eos_token_id], 1)
    assert [other.decode(token) for token in row.ids[row.start :]] == ["a", "ba", "b", "</s>"]
    assert row.chunks.first == [0, 1, 1, 2, 3]
    # The last b has ended because the text has.
    assert row.since == [0, 1, 1, 2, 2]


def test_what_nothing_predicts_is_in_no_chunk():
    own, other = both(BYTE_LEVEL, BYTE_LEVEL)
    ids = plain(own, "two and two")
    row = Retokenizer(own, other).row(ids, 0, prompt="", apart=True)
    assert row.start == 0
    assert row.chunks.first == [-1, *range(len(ids) - 1)]


def test_special_tokens_are_mapped_by_role_and_by_name():
    own, other = both(BYTE_LEVEL, LLAMA)
    turn = own.convert_tokens_to_ids("<|turn|>")
    mapped = counterparts(own, other)
    assert mapped[own.eos_token_id] == other.eos_token_id
    assert mapped[turn] == other.convert_tokens_to_ids("<|turn|>")
    assert own.unk_token_id not in mapped
    ids = [*plain(own, "two"), turn, *plain(own, " and"), own.eos_token_id]
    row = Retokenizer(own, other).row(ids, 1)
    assert row.ids.count(mapped[turn]) == 1
    assert row.ids[-1] == other.eos_token_id
    chunk = row.chunks.first[ids.index(turn) - 1]
    assert [k for k, c in enumerate(row.chunks.second) if c == chunk] == [
        row.ids.index(mapped[turn]) - row.start
    ]


def test_an_eos_of_another_name_is_the_eos():
    own = tokenizer_of_kind(BYTE_LEVEL)
    other = type(own)(
        tokenizer_object=own.backend_tokenizer, eos_token="<|turn|>", pad_token="<pad>"
    )
    assert counterparts(own, other)[own.eos_token_id] == other.eos_token_id != own.eos_token_id


def test_what_a_model_wrote_without_text_is_read_as_its_name():
    own, other = both(BYTE_LEVEL, BYTE_LEVEL)
    ids = [*plain(own, "two"), own.unk_token_id, *plain(own, " and"), 10_000]
    row = Retokenizer(own, other).row(ids, 1, generated=True)
    assert other.decode(row.ids) == "two<unk> and\ufffd"
    assert other.unk_token_id not in row.ids
    assert -1 not in row.chunks.first
    with pytest.raises(ValueError, match=r"the special token 1 .'<unk>'. has no counterpart"):
        Retokenizer(own, other).row(ids, 1)
    ids.remove(own.unk_token_id)
    with pytest.raises(ValueError, match="the text of the token 10000"):
        Retokenizer(own, other).row(ids, 1)


@pytest.mark.parametrize("name", ["<unk>", "<|tool|>"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_space_behind_what_is_read_as_a_name_is_text(name, apart):
    """As behind any other text; behind a special token that the teacher has too it is an added one."""
    own, other = deepcopy(tokenizer_of_kind(LLAMA)), byte_level()
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    names = ["\u2581t", name, "\u2581and", "he", "</s>", "\u2581t", name, name, "\u2581"]
    ids = own.convert_tokens_to_ids(["a", *names])
    prompt = "a" if apart else None
    row = Retokenizer(own, other).row(ids, 1, prompt=prompt, apart=apart, generated=True)
    begins = "t" if apart else " t"
    assert other.decode(row.ids) == f"a{begins}{name} andhe</s>t{name}{name} "


def test_unknown_text_is_refused_also_where_its_token_is_padding():
    own, other = KINDS["WordPiece"](), tokenizer_of_kind(BYTE_LEVEL)
    own.pad_token = own.unk_token
    assert own.pad_token_id not in counterparts(own, other)
    ids = plain(own, "two \u9999 and")
    with pytest.raises(ValueError, match=r"'<unk>'\) is not known"):
        Retokenizer(own, other).row(ids, 1)
    row = Retokenizer(own, other).row(ids, 1, generated=True)
    assert other.decode(row.ids) == "two <unk> and"
    assert other.pad_token_id not in row.ids


def test_what_a_tokenizer_alone_knows_as_unknown_has_no_counterpart():
    """The model of the letters' tokenizer gives padding for others, and the tokenizer names no unk."""
    own, other = fused_letter_tokenizer(), tokenizer_of_kind(BYTE_LEVEL)
    assert own.unk_token_id is None
    assert counterparts(own, other) == {own.eos_token_id: other.eos_token_id}
    row = [*plain(own, "a"), own.pad_token_id, *plain(own, "b")]
    assert other.decode(Retokenizer(own, other).row(row, 1, generated=True).ids) == "a<pad>b"
    with pytest.raises(ValueError, match=r"the text of the token 0 \('<pad>'\) is not known"):
        Retokenizer(own, other).row(row, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_completion_of_nothing_but_tokens_without_text_is_in_chunks(count):
    own, other = both(BYTE_LEVEL, BYTE_LEVEL)
    ids = [*plain(own, "two"), *[own.unk_token_id] * count]
    row = Retokenizer(own, other).row(ids, len(ids) - count, generated=True)
    assert row.chunks.first == list(range(count))
    assert other.decode(row.ids[row.start :]) == "<unk>" * count


def test_a_lone_space_that_a_model_wrote_is_text():
    own, other = both(LLAMA, BYTE_LEVEL)
    ids = [*plain(own, "a"), own.convert_tokens_to_ids("\u2581")]
    start = len(ids) - 1
    row = Retokenizer(own, other).row(ids, start, prompt="a", apart=True, generated=True)
    assert row.chunks.first == [0]
    assert other.decode(row.ids) == "a "


@pytest.mark.parametrize("teacher", [LLAMA, "Unigram with byte fallback"])
def test_a_space_is_read_where_the_student_wrote_one(teacher):
    own, other = both(BYTE_LEVEL, teacher)
    read = {}
    for completion in ("two", " two"):
        before = plain(own, "and")
        ids = [*before, *plain(own, completion)]
        row = Retokenizer(own, other).row(
            ids, len(before), prompt="and", apart=True, generated=True
        )
        read[completion] = row.ids
        assert other.decode(row.ids) == "and" + completion
    assert read["two"] != read[" two"]
    assert read[" two"] == plain(other, "and two")


@pytest.mark.parametrize("end", [None, "<|turn|>"])
def test_what_generation_ended_with_is_the_end(end):
    """As where the generation config of a student has further tokens that end a completion."""
    own, other = byte_level(), tokenizer_of_kind(LLAMA)
    own.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    stop = own.convert_tokens_to_ids("<|stop|>")
    ids = [*plain(own, "two"), stop]
    retokenizer = Retokenizer(own, other)
    row = retokenizer.row(ids, 1, generated=True, ended=True, end=end)
    expected = other.eos_token_id if end is None else other.convert_tokens_to_ids(end)
    assert row.ids[-1] == expected
    row = retokenizer.row(ids, 1, generated=True, end=end)
    assert other.decode(row.ids).endswith("<|stop|>")
    assert expected not in row.ids


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("prompt", [None, "two two"])
def test_a_row_has_no_more_tokens_than_its_bytes_tell(student, teacher, prompt):
    own, other = both(student, teacher)
    turn = own.convert_tokens_to_ids("<|turn|>")
    ids = [*encode_prompts(["two"], own)[0], turn, *plain(own, "four"), turn, own.eos_token_id]
    retokenizer = Retokenizer(own, other)
    most = retokenizer.most_tokens(ids, 2, prompt=prompt)
    assert (most is None) == (teacher == "WordPiece")  # which may lack a letter
    if most is not None:
        assert len(retokenizer.row(ids, 2, prompt=prompt).ids) <= most <= 30
    assert retokenizer.most_tokens([*ids, own.unk_token_id], 2) is None
    assert retokenizer.most_tokens([*ids, 10_000], 2) is None


@pytest.mark.parametrize("letter", ["\u0958", "\U0001d160", "e\u0301"])
def test_a_prompt_whose_letters_are_written_in_more_bytes_has_no_more_tokens_than_told(letter):
    """NFC takes some letters apart, as U+0958 (3 bytes into 6) and U+1D160 (4 into 12)."""
    own = byte_level()
    composing = byte_level(261, texts=["a"])  # a token for each byte
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    ids, prompt = [*plain(own, "four"), own.eos_token_id], letter * 10
    for other in (composing, byte_level(261, texts=["a"])):
        retokenizer = Retokenizer(own, other)
        most = retokenizer.most_tokens(ids, 0, prompt=prompt)
        assert len(retokenizer.row(ids, 0, prompt=prompt).ids) <= most
    assert most == len(prompt.encode()) + 2 + 4 + 2
    ascii_alone = Retokenizer(own, composing).most_tokens(ids, 0, prompt="two")
    assert ascii_alone == 3 + 2 + 4 + 2


def test_an_end_that_the_teacher_lacks_is_not_told_by_bytes():
    retokenizer = Retokenizer(byte_level(), byte_level())
    ids = [*plain(byte_level(), "four"), byte_level().eos_token_id]
    assert retokenizer.most_tokens(ids, 0, end="<e>") is None
    most = retokenizer.most_tokens(ids, 0, end="<|turn|>")
    assert len(retokenizer.row(ids, 0, end="<|turn|>").ids) <= most


def test_special_tokens_of_the_data_without_a_counterpart_are_refused():
    own, other = byte_level(), tokenizer_of_kind(LLAMA)
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tool = own.convert_tokens_to_ids("<|tool|>")
    ids = [*plain(own, "two"), tool, *plain(own, " and"), own.eos_token_id]
    message = f"the special token {tool} .'<.tool.>'. has no counterpart.*set data.eos_token"
    with pytest.raises(ValueError, match=message):
        Retokenizer(own, other).row(ids, 1)
    with pytest.raises(ValueError, match=message):
        Retokenizer(own, other).row(ids, len(ids) - 1)  # in what is read before
    assert tool not in Retokenizer(own, other).row(ids, len(ids) - 1, prompt="two").ids
    assert len(Retokenizer(own, other).row(ids, 1, generated=True).chunks.first) == len(ids) - 1


def test_a_prompt_that_the_teacher_cannot_write_is_refused():
    own, other = both(BYTE_LEVEL, "WordPiece")
    ids = plain(own, "\u9999 two")
    with pytest.raises(ValueError, match="cannot write all of '\u9999'"):
        Retokenizer(own, other).row(ids, len(ids) - 1, prompt="\u9999", apart=True)


def test_the_name_wins_over_the_role_where_the_teachers_template_has_it():
    own = deepcopy(tokenizer_of_kind(BYTE_LEVEL))
    own.eos_token = "<|turn|>"
    other = deepcopy(tokenizer_of_kind(LLAMA))
    assert counterparts(own, other)[own.eos_token_id] == other.eos_token_id
    other.chat_template = "{{ messages[0].content }}<|turn|>"
    turn = other.convert_tokens_to_ids("<|turn|>")
    assert counterparts(own, other)[own.eos_token_id] == turn != other.eos_token_id


def test_a_tokenizer_that_cannot_fill_up_rows_is_refused():
    backend = tokenizer_of_kind(BYTE_LEVEL).backend_tokenizer
    with pytest.raises(ValueError, match="neither padding nor EOS to fill up rows"):
        padding_id(PreTrainedTokenizerFast(tokenizer_object=backend))
