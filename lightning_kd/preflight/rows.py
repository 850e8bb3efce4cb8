"""Facts about the training rows: what is trained on, and what is left out."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import IGNORE_INDEX, Batch, check_batch, check_contents, has_prompts
from lightning_kd.data import ChatData, Collator, DistillationData, Example, PromptsAndText
from lightning_kd.data.generated import real_tokens
from lightning_kd.own_batches import is_own, with_prompts
from lightning_kd.preflight.facts import RowFacts, Token
from lightning_kd.preflight.tokenizers import turn_end
from lightning_kd.teacher_rows import has_teacher_rows
from lightning_kd.tokenization import padding_id

_ROWS_AT_ONCE = 32
_SHOWN = 48
"""Tokens of the example on each side of where its completion begins."""


Data = L.LightningDataModule | Iterable[Any]
"""A data module, or a loader of the user's own."""


def training_data(datamodule: Data) -> Data:
    """Return the data whose rows are prompts or texts of the method."""
    return datamodule.prompts if isinstance(datamodule, PromptsAndText) else datamodule


def roles_of(datamodule: Data) -> frozenset[str]:
    """Return who speaks in rows that are rendered by a chat template; empty of other rows."""
    data = training_data(datamodule)
    return data.roles if isinstance(data, ChatData) else frozenset()


def batches(
    datamodule: Data, looked_at: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Batch]:
    """Yield some training rows, spread over all of them, as training collates them.

    Args:
        datamodule: The data. Of one that is not this library's, or a loader, the first batches are
            taken, and the loader is iterated over.
        looked_at: Number of rows.
        tokenizer: The data's.

    Raises:
        ValueError: If rows cannot be read, or a batch is none that is trained on.
    """
    data = training_data(datamodule)
    if isinstance(data, DistillationData):
        data.read("train")
        numbers = spread(len(data.read_rows("train")), looked_at)
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            yield data.batch_of("train", numbers[start : start + _ROWS_AT_ONCE])
        return
    for batch in islice(_loader(data), max(1, looked_at // _ROWS_AT_ONCE)):
        if is_own(batch) and batch.get("labels") is None:
            yield _prompts_alone(batch, tokenizer)
            continue
        check_batch(batch)
        check_contents(batch)
        yield batch


def spread(size: int, count: int) -> list[int]:
    """Return at most so many of the numbers below ``size``, evenly: the first and the last among them.

    Example:
        >>> spread(5, 8), spread(10, 4), spread(10, 1)
        ([0, 1, 2, 3, 4], [0, 3, 6, 9], [0])
    """
    if size <= count:
        return list(range(size))
    return [number * (size - 1) // max(1, count - 1) for number in range(count)]


def begins_anew(loader: object) -> bool:
    """Return whether a look at a loader's batches leaves those of a run as they are.

    So it is where order and batches come from the global generators alone, which can be put back.
    """
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler | RandomSampler)
        and loader.generator is None
        and getattr(loader.sampler, "generator", None) is None
        and not loader.persistent_workers
    )


def _loader(data: Data) -> Iterable[Any]:
    if isinstance(data, L.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        loader: Iterable[Any] = data.train_dataloader()
        return loader
    if isinstance(data, Iterator):
        raise ValueError(
            f"the loader is a {type(data).__name__}, which gives its batches once: a look at them "
            "would take them from the run. Give a DataLoader, or anything that begins anew"
        )
    return data


def _prompts_alone(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return a batch of prompts, padded on either side, as this library collates prompts."""
    prompts = with_prompts(batch, tokenizer, 0)
    rows = real_tokens(prompts["prompt_ids"], prompts["prompt_mask"].bool())
    texts = prompts["prompt"]
    examples = [Example(ids, len(ids), text) for ids, text in zip(rows, texts, strict=True)]
    return Collator(padding_id(tokenizer))([(n, n, e) for n, e in enumerate(examples)])


def texts_of(some: Sequence[Batch], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return prompts and completions of a few rows, as text; of rows without prompts, what they say."""
    found: list[str] = []
    for batch in some[:1]:
        if has_prompts(batch):
            found += [text for text in (*batch["prompt"], *batch["completion"]) if text]
        else:
            rows = real_tokens(batch["input_ids"], batch["attention_mask"].bool())
            found += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return found[:_ROWS_AT_ONCE]


def describe_rows(
    datamodule: Data,
    some: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase,
    stops: Collection[int] = (),
) -> RowFacts:
    """Return what is known of training rows.

    Args:
        datamodule: The data.
        some: Rows of it, from :func:`batches`.
        tokenizer: The data's.
        stops: Tokens that the student stops at.
    """
    data, eos = training_data(datamodule), tokenizer.eos_token_id
    rows = data.read_rows("train") if isinstance(data, DistillationData) else None
    longest = max(int(batch["attention_mask"].sum(-1).max()) for batch in some)
    longest_prompt = max(
        (int(batch["prompt_mask"].sum(-1).max()) for batch in some if has_prompts(batch)), default=0
    )
    if isinstance(data, DistillationData):
        longest, longest_prompt = data.longest().get("train", (longest, longest_prompt))
    labeled = [batch["labels"] != IGNORE_INDEX for batch in some]
    of_eos = [(batch["labels"] == eos).any(-1) for batch in some]
    lengths = torch.cat([mask.sum(-1) for mask in labeled])
    return RowFacts(
        looked_at=len(lengths),
        kept=None if rows is None else len(rows),
        dropped=getattr(rows, "dropped", 0),
        cut=getattr(rows, "cut", 0),
        longest=longest,
        longest_prompt=longest_prompt,
        have_prompts=not any(
            bool(mask[:, 0].any()) for mask in labeled
        ),  # text is trained on whole
        labeled=int((lengths > 0).sum()),
        ended=int(torch.cat(of_eos).sum()),
        masked_ends=sum(_masked_ends(batch, eos) for batch in some),
        completions=[length for mask in labeled for length in _last_runs(mask)],
        most_labels=int(lengths.max()),
        example=_example(some[0], tokenizer),
        turn_end=turn_end(tokenizer) if isinstance(data, ChatData) else None,
        stopped=sum(last in stops for batch in some for last in _last_labels(batch)),
        told=_told(some[0], tokenizer),
    )


def _told(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of the prompt that the teacher reads of the first row."""
    if not (has_prompts(batch) and has_teacher_rows(batch)):
        return ""
    told = batch["teacher"]
    ids = told["prompt_ids"][0][told["prompt_mask"][0].bool()].tolist()
    shown: str = tokenizer.decode(ids[-_SHOWN:])
    return f"... {shown}" if len(ids) > _SHOWN else shown


def _last_labels(batch: Batch) -> Iterator[int]:
    """Yield the last label of each row that has one."""
    for row in batch["labels"]:
        labels = row[row != IGNORE_INDEX]
        if len(labels):
            yield int(labels[-1])


def _last_runs(labeled: Tensor) -> Iterator[int]:
    """Yield the length of the last stretch that is trained on of each row that has one, ``(B, T)``."""
    for row in labeled:
        places = row.nonzero()[:, 0]
        if len(places):
            breaks = (places.diff() > 1).nonzero()[:, 0]
            yield len(places) - (int(breaks[-1]) + 1 if len(breaks) else 0)


def _masked_ends(batch: Batch, eos: int | None) -> int:
    """Count rows with an EOS right behind what is trained on, which is not trained on.

    Padding may be the EOS as well, so it counts where a model attends to it, or where the row is the
    longest, which has no padding.
    """
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    count, width = 0, ids.shape[1]
    for row in range(len(ids)):
        places = (labels[row] != IGNORE_INDEX).nonzero()
        if len(places) == 0:
            continue
        behind = int(places[-1]) + 1
        if behind < width and ids[row, behind] == eos:
            count += bool(mask[row, behind]) or behind == width - 1
    return count


def _example(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """Return the tokens of the first row, without padding, around where its completion begins."""
    length = int(batch["attention_mask"][0].sum())
    ids, labels = batch["input_ids"][0, :length].tolist(), batch["labels"][0, :length].tolist()
    trained = [label != IGNORE_INDEX for label in labels]
    begin = trained.index(True) if True in trained else length
    shown = range(max(0, begin - _SHOWN), min(length, begin + _SHOWN))
    tokens = [Token(tokenizer.decode([ids[i]]), trained[i]) for i in shown]
    before = [Token("...", False)] if shown.start > 0 else []
    # The last token tells whether the row ends.
    last = Token(tokenizer.decode([ids[-1]]), trained[-1])
    behind = [Token("...", False), last] if shown.stop < length else []
    return [*before, *tokens, *behind]
