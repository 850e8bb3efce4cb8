"""Training of a tokenizer on a text."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_kd.data.sources import load_rows

EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text and decodes it unchanged.

    Args:
        texts: What to learn from.
        vocab_size: Tokens in all, the 256 bytes and two special tokens included.

    Raises:
        ValueError: If ``vocab_size`` does not hold the bytes and the special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["two and two is four"] * 3, vocab_size=270)
        >>> tokenizer.decode(tokenizer("two or five")["input_ids"])
        'two or five'
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 2 special tokens need 258")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(
    files: list[str] | str,
    output: str,
    vocab_size: int = 16_000,
    columns: list[str] | str | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on your text and save it as a Hugging Face directory.

    Args:
        files: Text files, or tables (.jsonl, .csv, .parquet): one, a glob, or a list.
        output: The directory.
        vocab_size: Tokens in all, 258 or more.
        columns: Column of a table, or a list of them. Defaults to ``text``.

    Raises:
        ValueError: If there is a model in the directory, whose tokenizer would be another one then.
    """
    if (Path(output) / "config.json").exists():
        raise ValueError(
            f"there is a model in {output!r}, whose tokens would mean something else; choose another "
            "directory"
        )
    texts = read_texts(files, columns)
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(Path(output))
    print(f"{len(tokenizer)} tokens, learned from {len(texts)} texts, are in {output}")


def read_texts(files: list[str] | str, columns: list[str] | str | None = None) -> list[str]:
    """Return the texts of some columns of files.

    Args:
        files: Text files, or tables: one, a glob, or a list.
        columns: Column of a table, or a list of them. Defaults to ``text``.

    Raises:
        ValueError: If a file or a column is not there.
    """
    wanted = [columns] if isinstance(columns, str) else columns or ["text"]
    return [
        row[column]
        for path in ([files] if isinstance(files, str) else files)
        for row in load_rows(path, dict.fromkeys(wanted, str))
        for column in wanted
    ]
