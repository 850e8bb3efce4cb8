"""Bytes of tokens, against the UTF-8 of the texts themselves."""

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.data.encoding import encode_documents
from lightning_kd.data.tokenizer_training import train_tokenizer
from lightning_kd.token_bytes import UNKNOWN, TokenBytes
from tests.support.tokenizers import KINDS, OF_EVERY_BYTE, tokenizer_of_kind
from tests.support.toys import letter_tokenizer

TEXTS = [
    "Once upon a time",
    "  two spaces, and\n\n\ttabs ",
    "h\u00e9llo \u6f22\u5b57 \U0001f642!",
    "ends in half",
]
BLOCK = "\u2581"


def wrapped(backend, **special):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False, **special
    )


def sentence_piece(adds_space=True):
    """A Llama's tokenizer: pieces of a few letters, and a token for each byte."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += [BLOCK, "O", "n", "c", "e", "t", "a", "On", "ce", f"{BLOCK}a", BLOCK * 2]
    merges = [("O", "n"), ("c", "e"), (BLOCK, "a"), (BLOCK, BLOCK)]
    model = models.BPE(
        {token: place for place, token in enumerate(letters)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    steps = [normalizers.Prepend(BLOCK)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLOCK)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLOCK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return wrapped(backend, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": lambda: train_tokenizer(["two and two is four, \u6f22\u5b57"] * 3, 290),
    "sentence-piece": sentence_piece,
    "without an added space": lambda: sentence_piece(adds_space=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_tokens_add_up_to_those_of_the_text(kind):
    tokenizer = TOKENIZERS[kind]()
    known = TokenBytes.of_tokenizer(tokenizer)
    for text in TEXTS:
        (ids,) = encode_documents([text], tokenizer, add_eos=True)
        assert ids[-1] == tokenizer.eos_token_id
        assert known.of(torch.tensor([ids])).sum() == len(text.encode())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_joined_documents_have_the_bytes_of_all(kind):
    """As in blocks of packed text; the added space of each document is told by the token before it."""
    tokenizer = TOKENIZERS[kind]()
    documents = encode_documents(TEXTS, tokenizer, add_eos=True)
    ids = torch.tensor([[token for document in documents for token in document]])
    total = TokenBytes.of_tokenizer(tokenizer).of(ids).sum()
    assert total == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_text_also_where_a_character_is_cut(kind):
    tokenizer = TOKENIZERS[kind]()
    known = TokenBytes.of_tokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        joined = b"".join(known.pieces[token] for token in ids)
        assert joined.removeprefix(b" " if kind == "sentence-piece" else b"") == text.encode()


def test_a_tokenizer_that_puts_a_space_before_a_text_counts_none_for_it():
    backend = train_tokenizer(["two and two"] * 3, 270).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens(["</s>"])
    known = TokenBytes.of_tokenizer(wrapped(backend))
    assert known.of(torch.tensor([wrapped(backend)("two and")["input_ids"]])).sum() == 7


def test_an_added_token_is_text_unless_it_is_special():
    tokenizer = train_tokenizer(["two and two"] * 3, 270)
    tokenizer.add_tokens(["\u00e9\u00e9"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    ids = torch.tensor([tokenizer("a\u00e9\u00e9<|turn|>b")["input_ids"]])
    assert TokenBytes.of_tokenizer(tokenizer).of(ids).tolist() == [[1, 4, 0, 1]]


def test_what_is_no_text_of_the_tokenizer_is_unknown():
    tokenizer = arithmetic_tokenizer()
    known = TokenBytes.of_tokenizer(tokenizer)
    ids = torch.tensor([[*tokenizer("12+")["input_ids"], tokenizer.eos_token_id, 10_000, -100]])
    assert known.of(ids).tolist() == [[1, 1, 1, 0, UNKNOWN, UNKNOWN]]
    assert known.lengths[tokenizer.pad_token_id] == UNKNOWN  # it stands for any other letter


def changed(**parts):
    backend = train_tokenizer(["two and two"] * 3, 270).backend_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return wrapped(backend)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (letter_tokenizer, "a space between tokens joins its tokens"),
        (lambda: changed(normalizer=normalizers.Lowercase()), "Lowercase changes a text"),
        (lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()), "Whitespace changes a text"),
        (lambda: changed(decoder=decoders.WordPiece()), "WordPiece joins its tokens"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tokenizer, reason):
    with pytest.raises(ValueError, match=reason):
        TokenBytes.of_tokenizer(tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_row_are_as_many_as_are_counted(kind):
    """With what is added to the beginning of a text, and behind special tokens."""
    tokenizer = tokenizer_of_kind(kind)
    known = TokenBytes.of_tokenizer(tokenizer)
    for text in ("two and two", "two</s>two</s>", "two<|turn|>and"):
        ids = [*tokenizer(text)["input_ids"], 10_000]
        for begins in (None, 0, 1, 2):
            apart = torch.zeros(1, len(ids), dtype=torch.bool)
            if begins is not None:
                apart[0, begins] = True
            pieces = known.of_row(ids, begins)
            sizes = [UNKNOWN if piece is None else len(piece) for piece in pieces]
            assert sizes == known.of(torch.tensor([ids]), apart)[0].tolist()
            plain = text.replace("</s>", "").replace("<|turn|>", "")
            if begins is None:
                assert b"".join(piece or b"" for piece in pieces).decode() == plain


def test_which_tokenizers_know_every_byte():
    known = {kind: TokenBytes.of_tokenizer(tokenizer_of_kind(kind)) for kind in KINDS}
    assert [kind for kind, each in known.items() if each.knows_every_byte] == OF_EVERY_BYTE
    assert all(
        each.to(torch.device("cpu")).knows_every_byte == each.knows_every_byte
        for each in known.values()
    )


def test_word_piece_that_drops_white_space_is_refused():
    tokenizer = tokenizer_of_kind("WordPiece")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with pytest.raises(ValueError, match="BertPreTokenizer changes a text before it is cut"):
        TokenBytes.of_tokenizer(wrapped(backend))


def test_letters_that_word_piece_has_not_seen_are_unknown():
    tokenizer = tokenizer_of_kind("WordPiece")
    (ids,) = tokenizer(["two \u9999"])["input_ids"]
    assert TokenBytes.of_tokenizer(tokenizer).of(torch.tensor([ids])).tolist() == [[3, 1, UNKNOWN]]


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_piece_of_the_models_own_that_is_an_added_token_too_is_written_as_a_piece(adds_space):
    """As transformers converts user-defined pieces of SentencePiece, such as Gemma's runs of spaces."""
    tokenizer = sentence_piece(adds_space)
    tokenizer.add_tokens([AddedToken(BLOCK * 2, normalized=False, special=False)])
    (ids,) = encode_documents(["a  a  On"], tokenizer, add_eos=True)
    assert tokenizer.convert_tokens_to_ids(BLOCK * 2) in ids
    assert TokenBytes.of_tokenizer(tokenizer).of(torch.tensor([ids])).sum() == len("a  a  On")


def byte_level(letters, **special):
    """Byte-level BPE that knows only some letters."""
    tokens = [*special.values(), "</s>", *letters]
    model = models.BPE({token: place for place, token in enumerate(tokens)}, [], **special)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, **special)


def test_what_a_byte_level_tokenizer_reads_as_unknown_has_no_known_bytes():
    tokenizer = byte_level("ab\u0120", unk_token="<unk>")
    ids = tokenizer("ab zz ba")["input_ids"]
    found = TokenBytes.of_tokenizer(tokenizer).of(torch.tensor([ids]))
    assert found.tolist() == [[1, 1, 1, UNKNOWN, UNKNOWN, 1, 1, 1]]


def test_a_tokenizer_that_leaves_out_unknown_letters_is_refused():
    tokenizer = byte_level("ab\u0120")
    assert tokenizer.decode(tokenizer("ab zz ba")["input_ids"]) == "ab  ba"
    with pytest.raises(ValueError, match="it leaves out letters that it does not know"):
        TokenBytes.of_tokenizer(tokenizer)
    every = byte_level(pre_tokenizers.ByteLevel.alphabet())
    ids = every("\u6f22 a")["input_ids"]
    assert TokenBytes.of_tokenizer(every).of(torch.tensor([ids])).sum() == 5
