"""Data modules for plain text: documents alone, or packed into blocks."""

from typing import Any, Literal, get_args

import datasets
import torch

from lightning_kd.data.datamodule import Split
from lightning_kd.data.encoding import Encoded, encode_documents
from lightning_kd.data.limits import DocumentPolicy, LengthLimit
from lightning_kd.data.objects import RowsLike
from lightning_kd.data.rows import ROWS_AT_ONCE, EncodedRows, PackedRows, pack
from lightning_kd.data.sources import load_rows
from lightning_kd.data.text import TextData
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows
from lightning_kd.option_checks import check_choice
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.tokenization import TokenizerLike

Offsets = Literal["random", "fixed"]


class PlainTextData(TextData):
    """Data modules of documents, each framed as the tokenizer frames a text.

    A document begins with what the tokenizer puts there (BOS, or nothing). Names of special tokens
    in a text are read as those tokens.

    The other options are those of :class:`~lightning_kd.data.text.TextData`.

    Args:
        text_column: Column of the text; a ``.txt`` file is one document.
        add_eos: Whether each document ends with an EOS, which is trained on and scored; one, also
            where the tokenizer appends it. False for pieces of text that end nowhere.
        strip: Whether white space at both ends of a document is left out.
    """

    def __init__(
        self,
        *,
        text_column: str = "text",
        add_eos: bool = True,
        strip: bool = False,
        train: RowsLike | None = None,
        validation: RowsLike | None = None,
        test: RowsLike | None = None,
        predict: RowsLike | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        tokenizer: TokenizerLike,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            subset=subset,
            extra_columns=extra_columns,
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        self.text_column, self.add_eos, self.strip = text_column, add_eos, strip

    def load(self, split: Split) -> datasets.Dataset | None:
        """The documents of a split, as text."""
        path = self.paths[split]
        if path is None:
            return None
        columns: dict[str, type] = dict.fromkeys([self.text_column, *self.extra_columns], str)
        return load_rows(path, columns, split=split, subset=self.subset)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return tokens of documents."""
        texts = [text.strip() for text in texts] if self.strip else texts
        return encode_documents(texts, self.tokenizer, add_eos=self.add_eos)


class DocumentData(PlainTextData):
    """Plain text, one document in a row and no other beside it; every token is trained on.

    For models that read each text from its beginning, and to score texts one by one. A batch is as
    wide as its longest document. With a ``prompt_length``, documents have prompts, for methods that
    generate.

    The other options are those of :class:`~lightning_kd.data.plain_text.PlainTextData`.

    Args:
        prompt_length: First tokens of each document that are its prompt, with what the tokenizer puts
            there: the loss is on what follows, and what is generated goes on from there. Of a shorter
            document, all but its last token. 0 for no prompts.
        max_length: Longest document, in tokens, with what the tokenizer adds.
        truncation: What happens to longer ones: ``error``, ``drop``, ``right`` (cut the end, and
            with it the EOS), or ``windows``: they are read on in rows of ``max_length``, each beginning
            with the last token of the one before, so that every token is scored once. What is dropped
            or cut is counted and logged.
        train_size: Number of documents of ``train`` that are trained on, drawn by the seed of the run;
            those of a smaller number are among those of a larger one. None for all.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        prompt_length: int = 0,
        max_length: int = 1024,
        truncation: DocumentPolicy = "error",
        train_size: int | None = None,
        text_column: str = "text",
        add_eos: bool = True,
        strip: bool = False,
        train: RowsLike | None = None,
        validation: RowsLike | None = None,
        test: RowsLike | None = None,
        predict: RowsLike | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        tokenizer: TokenizerLike,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            text_column=text_column,
            add_eos=add_eos,
            strip=strip,
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            subset=subset,
            extra_columns=extra_columns,
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        check_choice("truncation", truncation, get_args(DocumentPolicy))
        if prompt_length and truncation == "windows":
            raise ValueError(
                f"truncation is windows and prompt_length {prompt_length}: parts of a document have no "
                "prompts; choose error, drop or right, or leave prompt_length out"
            )
        if max_length < 2:
            raise ValueError(
                f"max_length is {max_length}; it must be 2 or more, for one token to predict another"
            )
        if not 0 <= prompt_length < max_length:
            raise ValueError(
                f"prompt_length is {prompt_length}; it must be 0, for no prompts, or more, and less "
                f"than max_length, which is {max_length}"
            )
        if train_size is not None and train_size < 1:
            raise ValueError(
                f"train_size is {train_size}; give 1 or more documents, or none for all"
            )
        self.prompt_length, self.train_size = prompt_length, train_size
        self.limit = LengthLimit(max_length, truncation=truncation)

    def rows(self, split: Split) -> Rows | None:
        """Documents of a split."""
        raw = self.load(split)
        if raw is None:
            return None
        if split == "train" and self.train_size is not None:
            raw = self._part(raw, self.train_size)

        def encode(columns: dict[str, list[Any]]) -> list[Encoded]:
            return [self._document(ids) for ids in self.encode(columns[self.text_column])]

        return EncodedRows(raw, encode, self.limit, self.extra_columns)

    def _part(self, raw: datasets.Dataset, size: int) -> datasets.Dataset:
        """Return the first of all documents in an order that the seed draws."""
        if size > len(raw):
            raise ValueError(
                f"data.train_size is {size} and data.train has {len(raw)} documents; give at most as "
                "many, or leave it out for all"
            )
        generator = torch.Generator().manual_seed(derive_seed(run_seed(), "train_size"))
        drawn: list[int] = torch.randperm(len(raw), generator=generator)[:size].tolist()
        return raw.select(sorted(drawn))

    def _document(self, ids: list[int]) -> Encoded:
        """Return a document, its first tokens as a prompt if documents have one."""
        # One with nothing behind its prompt is refused where documents of one token are.
        length = min(self.prompt_length, len(ids) - 1)
        if length < 1:
            return Encoded([], ids)
        prompt, rest = ids[:length], ids[length:]
        return Encoded(prompt, rest, self._text(prompt), self._text(rest))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class PackedTextData(PlainTextData):
    """Plain text, joined and cut into blocks of equal length; every token is trained on.

    Blocks begin and end anywhere in a document, and a model sees the document before. To keep
    documents apart, use :class:`DocumentData`.

    The other options are those of :class:`~lightning_kd.data.plain_text.PlainTextData`;
    ``extra_columns`` is refused, as a block has parts of several documents.

    Args:
        block_length: Tokens of a block.
        offsets: Where training blocks begin: at a ``random`` token in each pass, so that over the
            passes every token sees every context length, or ``fixed``, the same blocks in every
            pass, as a cache of a teacher needs them.

    Raises:
        ValueError: If there are extra columns, or the offsets are unknown.
    """

    def __init__(
        self,
        *,
        block_length: int = 128,
        offsets: Offsets = "random",
        text_column: str = "text",
        add_eos: bool = True,
        strip: bool = False,
        train: RowsLike | None = None,
        validation: RowsLike | None = None,
        test: RowsLike | None = None,
        predict: RowsLike | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        tokenizer: TokenizerLike,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            text_column=text_column,
            add_eos=add_eos,
            strip=strip,
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            subset=subset,
            extra_columns=extra_columns,
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        if self.extra_columns:
            raise ValueError(
                f"extra_columns is {self.extra_columns}, but a block of packed text has parts of "
                "several rows; leave it out, or use DocumentData"
            )
        check_choice("offsets", offsets, get_args(Offsets))
        self.block_length = block_length
        self.offsets: Offsets = offsets

    def rows(self, split: Split) -> Rows | None:
        """Blocks of a split; training blocks start elsewhere in each pass, unless they are fixed."""
        raw = self.load(split)
        if raw is None:
            return None
        texts = (rows[self.text_column] for rows in raw.iter(ROWS_AT_ONCE))
        tokens = pack(ids for some in texts for ids in self.encode(some))
        moves = split == "train" and self.offsets == "random"
        return PackedRows(tokens, self.block_length, run_seed() if moves else None)
