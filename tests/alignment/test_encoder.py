"""The bytes of each token of a text, for five kinds of trained tokenizers."""

from copy import deepcopy
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from lightning_kd.alignment import ByteEncoder, align
from tests.support.tokenizers import (
    KINDS,
    OF_EVERY_BYTE,
    SPACE,
    TEXTS,
    byte_level,
    tokenizer_of_kind,
    wrapped,
)

# Letters that tokenizers treat each in its own way: emoji of several code points, combining marks,
# right-to-left text, composed and decomposed letters, white space, SentencePiece's letter for a space.
LETTERS = [
    *"ab tw.,!\n\t\u00e9\u6f22\u05e9\u0645\u0301\u200d\u2581",
    "\U0001f642",
    "\U0001f469\u200d\U0001f680",
    "e\u0301",
    "\ufb01",
    "</s>",
    "<|turn|>",
    "##",
]
WORDS = st.sampled_from([*LETTERS, *TEXTS[1].split(" ")])
SOME_TEXT = st.one_of(
    st.lists(WORDS, max_size=12).map("".join), st.text(st.characters(codec="utf-8"), max_size=12)
)
KNOWN = st.sampled_from([" two", " and", " the", ",", "  ", " teacher", "."])
"""What WordPiece has learned words of."""
QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)


@cache
def encoder(kind):
    return ByteEncoder(tokenizer_of_kind(kind))


def joined(tokens):
    return b"".join(token.bytes for token in tokens)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_EVERY_BYTE)
@pytest.mark.parametrize("begins", [True, False])
@QUICK
@given(text=SOME_TEXT)
def test_the_bytes_of_the_tokens_are_those_of_the_text(kind, begins, text):
    assert joined(encoder(kind).encode(text.encode(), begins=begins)) == text.encode()


@pytest.mark.parametrize("kind", OF_EVERY_BYTE)
@QUICK
@given(text=st.binary(max_size=12))
def test_broken_text_has_its_bytes_too(kind, text):
    assert joined(encoder(kind).encode(text)) == text


@QUICK
@given(text=st.lists(KNOWN, max_size=12).map("".join))
def test_word_piece_has_them_of_letters_that_it_knows(text):
    assert joined(encoder("WordPiece").encode(text.encode())) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS[:2], "na\u00efve caf\u00e9"])
def test_the_tokens_are_those_of_the_tokenizer(kind, text):
    tokenizer = tokenizer_of_kind(kind)
    found = encoder(kind).encode(text.encode())
    assert [token.id for token in found] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(found) < len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_a_special_token_in_a_text_is_text(kind):
    if kind == "WordPiece":
        pytest.skip("it has no token for the letters of the name")
    tokenizer = tokenizer_of_kind(kind)
    found = [token.id for token in encoder(kind).encode(b"a</s>b")]
    assert tokenizer.eos_token_id in tokenizer("a</s>b")["input_ids"]
    assert tokenizer.eos_token_id not in found


@pytest.mark.parametrize("name", ["</s>", "<unk>"])
@pytest.mark.parametrize("text", ["two and{} two", "{}", "the{}{}r", "two and {}e"])
def test_unigram_reads_the_names_of_its_own_tokens_as_if_they_were_called_otherwise(name, text):
    tokenizer = tokenizer_of_kind("Unigram with byte fallback")
    state = tokenizer.backend_tokenizer.to_str()
    bare = wrapped(Tokenizer.from_str(state.replace(f'"{name}"', '"another"')))
    written = text.format(*[name] * 2)
    bare.backend_tokenizer.encode_special_tokens = True
    expected = bare.backend_tokenizer.encode(written, add_special_tokens=False).ids
    assert tokenizer.convert_tokens_to_ids(name) not in expected
    found = encoder("Unigram with byte fallback").encode(written.encode())
    assert [token.id for token in found] == expected
    assert joined(found) == written.encode()


@pytest.mark.parametrize(
    "kind", ["SentencePiece BPE with byte fallback", "Unigram with byte fallback"]
)
def test_the_name_of_a_bytes_token_is_text_and_changes_nothing_before_it(kind):
    found = encoder(kind).encode(b"two and<0x41>the")
    assert joined(found) == b"two and<0x41>the"
    before = encoder(kind).encode(b"two and")
    assert found[: len(before)] == before
    assert [token.bytes for token in found[len(before) :]][-2:] in ([b"t", b"he"], [b"the"])


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
@settings(parent=QUICK, max_examples=5)
@given(data=st.data())
def test_chunks_have_the_same_bytes_on_both_sides(first, second, data):
    known = st.lists(KNOWN, max_size=12).map("".join)
    text = data.draw(known if "WordPiece" in (first, second) else SOME_TEXT)
    sides = [encoder(kind).encode(text.encode()) for kind in (first, second)]
    chunks = align(*([len(token.bytes) for token in side] for side in sides))
    parts = []
    for side, numbers in zip(sides, (chunks.first, chunks.second), strict=True):
        assert numbers == sorted(numbers)
        by_chunk = [b""] * chunks.count
        for token, number in zip(side, numbers, strict=True):
            if number >= 0:
                by_chunk[number] += token.bytes
        parts.append(by_chunk)
        assert set(numbers) - {-1} == set(range(chunks.count))
        assert b"".join(by_chunk) == text.encode()
    assert parts[0] == parts[1]


@pytest.mark.parametrize("kind", OF_EVERY_BYTE)
@settings(parent=QUICK, max_examples=10)
@given(text=SOME_TEXT, data=st.data())
def test_a_text_is_cut_anywhere_also_inside_a_character(kind, text, data):
    at = data.draw(st.integers(0, len(text.encode())))
    own = encoder(kind)
    before, after = own.split(own.encode(text.encode()), at)
    assert joined(before) == text.encode()[:at]
    assert joined(after) == text.encode()[at:]


def test_a_character_in_several_tokens_is_one_chunk_beside_a_token_of_it():
    """What one side has in one token and the other in its four bytes."""
    whole = ByteEncoder(
        byte_level(
            420, texts=["\U0001f642\U0001f642 \U0001f642 \U0001f642\U0001f642\U0001f642"] * 9
        )
    )
    parts = encoder("byte-level BPE").encode("\U0001f642".encode())
    assert len(parts) == 4
    (one,) = whole.encode("\U0001f642".encode())
    assert align([len(one.bytes)], [len(p.bytes) for p in parts]).second == [0, 0, 0, 0]


def test_letters_without_a_token_are_refused():
    with pytest.raises(ValueError, match="cannot write all of '\u9999'"):
        encoder("WordPiece").encode("\u9999".encode())
    with pytest.raises(ValueError, match="has no token for the byte 0xff"):
        encoder("WordPiece").encode(b"a\xff")


def test_a_tokenizer_that_changes_letters_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="Lowercase changes a text before it is cut"):
        ByteEncoder(tokenizer)


def composing(kind):
    """A tokenizer that composes letters before it cuts a text, as Qwen's do."""
    backend = deepcopy(tokenizer_of_kind(kind)).backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), *own])
    return wrapped(backend)


@pytest.mark.parametrize("kind", OF_EVERY_BYTE)
@pytest.mark.parametrize("text", ["cafe\u0301 two", "two cafe\u0301", "e\u0301", "caf\u00e9 two"])
def test_letters_that_a_tokenizer_would_compose_are_given_as_they_are(kind, text):
    """As by the same tokenizer without that step: what is before a mark does not depend on it."""
    tokenizer = composing(kind)
    composed = "e\u0301" in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (tokenizer.decode(ids).strip() != text) == composed
    found = ByteEncoder(tokenizer).encode(text.encode())
    assert joined(found) == text.encode()
    assert found == encoder(kind).encode(text.encode())
    assert ([token.id for token in found] == ids) == (not composed)


@pytest.mark.parametrize("kind", OF_EVERY_BYTE)
@pytest.mark.parametrize("place", range(8))
def test_a_letter_that_means_a_space_changes_the_tokens_of_its_word_alone(kind, place):
    words = ["Once", " upon", " a", " time,", " two", " and", " two", " were four"]
    bare = encoder(kind).encode("".join(words).encode())
    words[place] += SPACE
    found = encoder(kind).encode("".join(words).encode())
    assert joined(found) == "".join(words).encode()
    before = len("".join(words[: place + 1]).encode()) - len(SPACE.encode())
    behind = len("".join(words[place + 1 :]).encode())

    def cut(tokens):
        start = [token for k, token in enumerate(tokens) if len(joined(tokens[: k + 1])) <= before]
        end = [token for k, token in enumerate(tokens) if len(joined(tokens[k:])) <= behind]
        return start, end

    assert cut(found) == cut(bare)
    assert joined(cut(found)[0]) + SPACE.encode() + joined(cut(found)[1]) == joined(found)


def test_words_that_a_tokenizer_writes_differently_are_given_in_bytes():
    """A token that takes the white space before it along is not the text's bytes."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    own = ByteEncoder(tokenizer)
    found = own.encode(b"two  <mask> and two")
    before, behind = own.encode(b"two"), own.encode(b" and two", begins=False)
    assert [found[: len(before)], found[-len(behind) :]] == [before, behind]
    assert [t.bytes.decode() for t in found[len(before) : -len(behind)]] == [*"  <mask>"]


WITHOUT_ADDED_SPACE = {
    "byte-level BPE with a prefix space": (
        "pre_tokenizer",
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "SentencePiece BPE with byte fallback": ("normalizer", normalizers.Replace(" ", SPACE)),
    "Unigram with byte fallback": (
        "pre_tokenizer",
        pre_tokenizers.Metaspace(prepend_scheme="never"),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_ADDED_SPACE)
@pytest.mark.parametrize("text", ["They saw the dog", "The teacher", "four two", " and two"])
def test_what_goes_on_is_tokenized_without_the_space_that_begins_a_text(kind, text):
    bare = deepcopy(tokenizer_of_kind(kind))
    part, step = WITHOUT_ADDED_SPACE[kind]
    setattr(bare.backend_tokenizer, part, step)
    found = encoder(kind).encode(text.encode(), begins=False)
    assert [token.id for token in found] == bare(text, add_special_tokens=False)["input_ids"]


def test_a_letter_with_a_token_is_never_that_of_a_byte():
    """Those of bytes have the lower numbers, as in Llama 2."""
    kind = "SentencePiece BPE with byte fallback"
    names = tokenizer_of_kind(kind).convert_ids_to_tokens
    found = encoder(kind).encode(f"two {SPACE}and".encode())  # no text has that letter for a space
    assert [names(token.id) for token in found[-6:]] == [
        "\u2581",
        "<0xE2>",
        "<0x96>",
        "<0x81>",
        "a",
        "nd",
    ]


def test_a_part_of_a_token_is_written_in_the_tokenizers_tokens():
    own = encoder("SentencePiece BPE with byte fallback")
    names = tokenizer_of_kind("SentencePiece BPE with byte fallback").convert_ids_to_tokens
    text = b"Once the teacher"
    for at in range(len(text)):
        before, after = own.split(own.encode(text), at)
        assert not [t for t in before + after if names(t.id).startswith("<0x")]


def test_a_tokenizer_that_cuts_by_chance_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(
        ValueError, match=r"has a dropout of 0\.5, which cuts a text in other tokens"
    ):
        ByteEncoder(tokenizer)


def test_another_letter_for_a_space_is_refused():
    tokenizer = KINDS["Unigram with byte fallback"]()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_")
    with pytest.raises(ValueError, match=r"Metaspace\('_'\) changes a text before it is cut"):
        ByteEncoder(tokenizer)
