"""Tokenized data sets: one example per row and pass."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import datasets
import torch
from torch import Tensor

from lightning_kd.batch import TEACHER_PROMPT
from lightning_kd.data.encoding import Encoded, Example
from lightning_kd.data.limits import LengthLimit
from lightning_kd.data.sources import WHERE
from lightning_kd.seeding import derive_seed

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows that are tokenized together."""

Encode = Callable[[dict[str, list[Any]]], list[Encoded]]
"""Columns of some rows to the tokens and texts of their prompts and completions."""


class RawRows(Protocol):
    """Rows before they are tokenized, as a :class:`datasets.Dataset` is, some columns at a time."""

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield columns of rows, with their places in :data:`~lightning_kd.data.sources.WHERE`."""
        ...


class EncodedRows:
    """Rows of prompt and completion, or documents, tokenized once, within a length limit.

    Args:
        raw: The rows, as :func:`~lightning_kd.data.sources.load_rows` gives them.
        encode: Tokenizes some rows.
        limit: What happens to long rows.
        extra: Columns that go along as they are.

    Raises:
        ValueError: If a row exceeds the limit and may not be cut, or none is left.
    """

    def __init__(
        self,
        raw: RawRows,
        encode: Encode,
        limit: LengthLimit,
        extra: Sequence[str] = (),
    ) -> None:
        self._extra = extra
        self.cut_prompt: str | None = None
        """Place of the first row whose prompt is cut for the student, and whole for a teacher that
        reads another text."""
        columns: dict[str, list[Any]] = defaultdict(list)
        remarks: list[tuple[str, str]] = []
        document = -1
        for rows in raw.iter(ROWS_AT_ONCE):
            found = zip(encode(rows), rows[WHERE], strict=True)
            for place, (encoded, where) in enumerate(found):
                document += 1
                for part in limit.windows(encoded.completion):
                    row = _limited(replace(encoded, completion=part), limit, where)
                    is_cut = not row["dropped"] and row["prompt_length"] < len(encoded.prompt)
                    other = encoded.teacher_prompt is not None or TEACHER_PROMPT in extra
                    if is_cut and (other or encoded.tokenized_apart):
                        self.cut_prompt = self.cut_prompt or where
                    row |= {f"extra:{name}": rows[name][place] for name in extra}
                    row["document"] = document
                    for name, value in row.items():
                        columns[name].append(value)
                remarks += [(remark, where) for remark in encoded.remarks]
        self.max_lengths = (max(map(len, columns["input_ids"])), max(columns["prompt_length"]))
        told = zip(
            *(columns[name] for name in ("teacher_prompt", "input_ids", "prompt_length")),
            strict=True,
        )
        lengths = [(len(p) + len(ids) - n, len(p)) for p, ids, n in told if p is not None and ids]
        self.max_teacher_lengths = (
            (max(row for row, _ in lengths), max(prompt for _, prompt in lengths))
            if lengths
            else None
        )
        """Tokens of the longest row and prompt that the teacher reads; None where it reads these."""
        tokenized = datasets.Dataset.from_dict(columns)
        keep = [row for row, dropped in enumerate(tokenized["dropped"]) if not dropped]
        self.dropped = len(tokenized) - len(keep)
        if not keep:
            raise ValueError(
                f"all {len(tokenized)} rows are longer than max_length={limit.max_length} allows; "
                "raise it, or choose a truncation that cuts rows"
            )
        self._numbers_differ = self.dropped > 0 or document + 1 < len(tokenized)
        self._tokenized = tokenized if not self.dropped else tokenized.select(keep)
        self.cut = sum(self._tokenized["cut"])
        self.cut_at_eos = self._count_cut_at_eos()
        for remark in dict.fromkeys(remark for remark, _ in remarks):
            places = [where for said, where in remarks if said == remark]
            log.warning(
                "of %d rows, %d %s. The first is %s", len(tokenized), len(places), remark, places[0]
            )
        if self.dropped or self.cut:
            log.warning(
                "of %d rows, %d were dropped and %d cut (max_length=%d, truncation=%s)",
                len(tokenized),
                self.dropped,
                self.cut,
                limit.max_length,
                limit.truncation,
            )

    def _count_cut_at_eos(self) -> int:
        """Warn of the number of rows whose completions continue after an EOS in their text."""
        behind = [row for row, text in enumerate(self._tokenized["after_eos"]) if text]
        if behind:
            first = self._tokenized[behind[0]]
            log.warning(
                "of %d rows, %d have text behind an EOS inside their completion, and that text is "
                "left out: generation would have stopped there. The first is %s, which goes on with "
                "%r. Names of special tokens in a text are read as those tokens: take them out of the "
                "text, or make a row of what stands before and one of what stands behind",
                len(self._tokenized),
                len(behind),
                first["where"],
                first["after_eos"][:60],
            )
        return len(behind)

    def __len__(self) -> int:
        """Rows that were kept."""
        return len(self._tokenized)

    def column(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the values of a further column, each with its place in the files.

        Raises:
            ValueError: If there is no such column.
        """
        if name not in self._extra:
            raise ValueError(
                f"the rows have no column {name!r}; name it in data.extra_columns (there are "
                f"{sorted(self._extra)})"
            )
        yield from zip(self._tokenized["where"], self._tokenized[f"extra:{name}"], strict=True)

    def place_of(self, row: int) -> str:
        """Return the place of a row in the files."""
        return str(self._tokenized[row]["where"])

    def example(self, row: int, pass_: int) -> Example:
        """The same tokens in every pass."""
        found = self._tokenized[row]
        return Example(
            found["input_ids"],
            found["prompt_length"],
            found["prompt"],
            found["completion"],
            {name: found[f"extra:{name}"] for name in self._extra},
            found["trained"],
            found["references"],
            found["tokenized_apart"],
            found["document"] if self._numbers_differ else None,
            found["teacher_prompt"],
        )


def _limited(encoded: Encoded, limit: LengthLimit, where: str) -> dict[str, Any]:
    prompt, completion = encoded.prompt, encoded.completion
    if encoded.prompt_text is None and len(completion) < 2:
        raise ValueError(
            f"{where}: the document has {len(completion)} tokens, so there is none to predict from "
            "another; leave the row out"
        )
    if encoded.prompt_text is not None and not prompt:
        raise ValueError(
            f"{where}: the prompt has no tokens, so nothing predicts the first of the completion; "
            "leave the row out, or give a prompt_template with some text"
        )
    # A token and whether it is trained on are cut together.
    marks = encoded.trained or [False] * len(prompt) + [True] * len(completion)
    tokens = list(zip([*prompt, *completion], marks, strict=True))
    kept = limit.apply(tokens[: len(prompt)], tokens[len(prompt) :], where)
    if kept is not None and any(marks) and not any(mark for part in kept for _, mark in part):
        kept = None  # nothing is left to learn
    told = encoded.teacher_prompt
    if kept and told is not None and not limit.takes_teacher(len(told), len(kept[1]), where):
        kept = None
    ids, trained = zip(*(kept[0] + kept[1]), strict=True) if kept else ((), ())
    return {
        "input_ids": ids,
        "trained": trained if encoded.trained else (),
        "prompt_length": len(kept[0]) if kept else 0,
        "prompt": encoded.prompt_text,
        "completion": encoded.completion_text,
        "references": encoded.references,
        "tokenized_apart": encoded.tokenized_apart,
        "dropped": kept is None,
        "cut": kept is not None and len(ids) < len(prompt) + len(completion),
        "after_eos": encoded.after_eos,
        "teacher_prompt": told,
        "where": where,
    }


class PackedRows:
    """Plain text as blocks of equal length, every token trained on.

    In training, each pass starts at a random offset, so
    that over the passes every token sees every context length; there is one block less than fits, so
    that the number of blocks is the same for every offset (as BabyLlama does).

    Args:
        tokens: All documents in a row, ``(tokens,)``.
        block_length: Tokens of a block.
        seed: Decides the offsets; None to start at 0 in every pass, as evaluation does.

    Raises:
        ValueError: If the text is too short for a block.

    References:
        Timiryasov and Tastet, *Baby Llama*, 2023. https://arxiv.org/abs/2308.02019
    """

    def __init__(self, tokens: Tensor, block_length: int, seed: int | None) -> None:
        if block_length < 2:
            raise ValueError(f"block_length is {block_length}; it must be 2 or more")
        blocks = len(tokens) // block_length - (seed is not None)
        if blocks < 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, too few for blocks of {block_length}; "
                "give more text or a smaller block_length"
            )
        self.tokens, self.block_length, self.seed, self.blocks = tokens, block_length, seed, blocks
        self.max_lengths = (block_length, 0)

    @property
    def changes_with_pass(self) -> bool:
        """Whether the blocks of each pass begin elsewhere."""
        return self.seed is not None

    def __len__(self) -> int:
        """Blocks in a pass."""
        return self.blocks

    def example(self, row: int, pass_: int) -> Example:
        """A block; where it begins depends on the pass."""
        shift = derive_seed(self.seed, "offset", pass_) if self.seed is not None else 0
        start = row * self.block_length + shift % self.block_length
        return Example(self.tokens[start : start + self.block_length].tolist())


def pack(documents: Iterable[list[int]]) -> Tensor:
    """Return all documents as one row of tokens, ``(tokens,)``."""
    return torch.cat([torch.tensor(ids, dtype=torch.long) for ids in documents])
