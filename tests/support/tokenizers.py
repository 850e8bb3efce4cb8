"""Five kinds of tokenizers, trained on a few sentences."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Once upon a time, two and two were four.",
    "The teacher reads the text, and the student reads the text.",
    "na\u00efve caf\u00e9, \u6f22\u5b57, \u05e9\u05dc\u05d5\u05dd, \u0645\u0631\u062d\u0628\u0627!",
    "  two spaces,\nand a line",
] * 3
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|turn|>"]
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def wrapped(backend):
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|turn|>"],
        clean_up_tokenization_spaces=False,
        **names,
    )


def byte_level(size=340, prefix_space=False, texts=TEXTS):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return wrapped(backend)


def trained(model, trainer, pre_tokenizer):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(TEXTS, trainer)
    return json.loads(backend.to_str())["model"]


def sentence_piece_bpe():
    """As Llama 2: the space is put before the text by the normalizer."""
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    learned = trained(models.BPE(), trainer, pre_tokenizers.Metaspace())
    tokens = list(dict.fromkeys([*SPECIAL, *BYTES, *learned["vocab"]]))
    model = models.BPE(
        {token: place for place, token in enumerate(tokens)},
        [tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(backend)


def unigram():
    """As T5 and Gemma's kin: Unigram, its spaces written by Metaspace, with byte fallback."""
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    learned = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    scores = dict(learned["vocab"])
    lowest = min(scores.values())
    pieces = [(token, scores.pop(token, 0.0)) for token in SPECIAL]
    pieces += [*scores.items(), *((byte, lowest - 10) for byte in BYTES)]
    backend = Tokenizer(models.Unigram(pieces, SPECIAL.index("<unk>"), True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return wrapped(backend)


def word_piece():
    """Words and white space are cut apart and kept; letters that it has not seen are unknown."""
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIAL, show_progress=False)
    parts = [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Punctuation()]
    cut = pre_tokenizers.Sequence(parts)
    learned = trained(models.WordPiece(unk_token="<unk>"), trainer, cut)
    backend = Tokenizer(models.WordPiece(learned["vocab"], unk_token="<unk>"))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.WordPiece()
    return wrapped(backend)


KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE with a prefix space": lambda: byte_level(400, prefix_space=True),
    "SentencePiece BPE with byte fallback": sentence_piece_bpe,
    "Unigram with byte fallback": unigram,
    "WordPiece": word_piece,
}
OF_EVERY_BYTE = [kind for kind in KINDS if kind != "WordPiece"]


@cache
def tokenizer_of_kind(kind):
    return KINDS[kind]()
