"""What is settled before a token is the same whatever is written from it on: all short texts."""

from itertools import product

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_kd.alignment import Retokenizer
from tests.support.tokenizers import SPACE, tokenizer_of_kind

HALVES = "\u00c3", "\u00a9"  # letters of byte-level BPE for the bytes of \u00e9
LONGEST = 4
LLAMA = tokenizer_of_kind("SentencePiece BPE with byte fallback")
UNIGRAM = tokenizer_of_kind("Unigram with byte fallback")


def merging(*merges, cuts=False):
    """Byte-level BPE with these merges; with GPT-2's cuts before them, where asked."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("</s>", "<z>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def first_parts(row):
    """For each token, the chunks before those that it has a part in, in tokens of both sides."""
    scored = row.ids[row.start :]
    return [
        (
            [
                token
                for token, chunk in zip(scored, row.chunks.second, strict=True)
                if 0 <= chunk < since
            ],
            [chunk for chunk in row.chunks.first if 0 <= chunk < since],
        )
        for since in row.since
    ]


CASES = {
    "half a character joins the letter before it": (merging(("a", "\u00c3")), ["a", *HALVES]),
    "spaces before half a character": (
        merging(("\u0120", "\u0120"), HALVES, cuts=True),
        ["\u0120", *HALVES],
    ),
    "spaces before a letter": (
        merging(("\u0120", "\u0120"), ("\u0120", "a"), cuts=True),
        ["\u0120", "a", "b"],
    ),
    "letters": (merging(("a", "b"), ("b", "b"), ("ab", "a")), ["a", "b", "</s>"]),
    "a token without text": (merging(("a", "<"), ("<", "z"), (">", "a")), ["a", "<z>", "</s>"]),
    "SentencePiece": (
        tokenizer_of_kind("SentencePiece BPE with byte fallback"),
        ["t", "h", "\u0120", "\u00e2", "\u0138", "\u0123"],
    ),
}


OF_OTHERS = {  # with the student's tokenizer
    "a space before a whole letter": (LLAMA, ["<0xE0>", "<0xA4>", "<0x80>", "</s>"], LLAMA),
    "a space that a text begins with": (LLAMA, [SPACE, f"{SPACE}t", "t", "</s>"], LLAMA),
    "a space behind a token": (LLAMA, [SPACE, "<|turn|>", f"{SPACE}t", "<0xE0>"], LLAMA),
    "a space before Unigram's": (UNIGRAM, [SPACE, f"{SPACE}t", "e", "<0xE0>"], LLAMA),
    "a name that Unigram has a token for": (UNIGRAM, ["e", "<unk>", "r", f"{SPACE}t"], LLAMA),
    "the letters of such a name": (
        *(UNIGRAM, ["he", "</", "s", ">"], merging(("h", "e"), ("<", "/"))),
    ),
    "the letters of a byte's name": (
        UNIGRAM,
        ["he", "<0", "x4", "1>"],
        merging(("h", "e"), ("<", "0"), ("x", "4"), ("1", ">")),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES | OF_OTHERS)
@pytest.mark.parametrize("prompt", [None, "a", ""])
def test_what_is_settled_before_a_token_does_not_depend_on_what_follows(case, prompt):
    teacher, letters, student = (*(CASES | OF_OTHERS)[case], merging())[:3]
    ids = student.convert_tokens_to_ids(letters)
    retokenizer, settled, latest = Retokenizer(student, teacher), {}, 0
    begin = student.convert_tokens_to_ids(["a"])
    for length in range(1, LONGEST + 1):
        for written in product(ids, repeat=length):
            row = retokenizer.row(
                [*begin, *written], 1, prompt=prompt, apart=prompt is not None, generated=True
            )
            assert row.start == 0 or -1 not in row.chunks.first
            for place, parts in enumerate(first_parts(row)):
                assert settled.setdefault(written[:place], parts) == parts
            latest = max(latest, *row.since)
    assert latest > 0, "nothing is ever settled"
