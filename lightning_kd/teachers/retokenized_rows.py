"""Rows of a micro-batch in the tokens of a teacher."""

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, cast

from lightning_kd.alignment import AlignedRow, Retokenizer
from lightning_kd.batch import (
    IGNORE_INDEX,
    TEACHER_END,
    TEACHER_PROMPT,
    Batch,
    Rollout,
    has_prompts,
    pad_rows,
)
from lightning_kd.devices import to_device
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.text_coverage import UnreadableRowError


def aligned_rows(
    retokenizer: Retokenizer, batch: Batch, positions: ScoredPositions
) -> list[AlignedRow | None]:
    """Return each row in the teacher's tokens; None for one in which nothing is scored.

    Args:
        retokenizer: From the data's tokens to the teacher's.
        batch: The rows.
        positions: What is scored of them.

    Raises:
        ValueError: If a row is scored in several parts, or its text cannot be read or written.
    """
    rows = _student_rows(batch, positions)
    return [None if row is None else retokenizer.row(**row) for row in rows]


def check_rows(
    retokenizer: Retokenizer,
    batch: Batch,
    positions: ScoredPositions,
    longest: int | None,
    cure: str,
) -> None:
    """Validate that rows can be read in the teacher's tokens, of which few need to be written for that.

    Args:
        retokenizer: From the data's tokens to the teacher's.
        batch: The rows.
        positions: What is scored of them.
        longest: Tokens that the teacher reads at most; None for any number.
        cure: What to do about a longer row.

    Raises:
        UnreadableRowError: If one cannot be read or written, or is longer.
    """
    rows = _student_rows(batch, positions)
    for number in batch["row"].tolist():
        try:
            row = next(rows)
            if row is None:
                continue
            most = retokenizer.most_tokens(
                row["ids"], row["start"], prompt=row["prompt"], end=row["end"]
            )
            if most is None or (longest is not None and most > longest):
                check_longest([retokenizer.row(**row)], longest, cure)
        except ValueError as error:
            raise UnreadableRowError(number, str(error)) from error


def check_longest(rows: Sequence[AlignedRow | None], longest: int | None, cure: str) -> None:
    """Validate that no row is longer than a teacher reads.

    Args:
        rows: The rows, in the teacher's tokens.
        longest: Tokens that the teacher reads at most; None for any number.
        cure: What to do about a longer row.

    Raises:
        ValueError: If one is.
    """
    width = max((len(row.ids) for row in rows if row is not None), default=0)
    if longest is not None and width > longest:
        raise ValueError(
            f"a row has {width} tokens of the teacher's, which reads {longest} at most: {cure}"
        )


class _StudentRow(TypedDict):
    """Arguments of :meth:`Retokenizer.row`."""

    ids: list[int]
    start: int
    prompt: str | None
    apart: bool
    generated: bool
    ended: bool
    end: str | None


def _student_rows(batch: Batch, positions: ScoredPositions) -> Iterator[_StudentRow | None]:
    """Yield each row, up to its last scored token; None for one in which nothing is scored."""
    ids, scored = batch["input_ids"].tolist(), positions.mask.tolist()
    apart = batch["tokenized_apart"].tolist() if "tokenized_apart" in batch else []
    ended = cast(Rollout, batch)["ended"].tolist() if "ended" in batch else []
    for number, mask in enumerate(scored):
        predicted = [place + 1 for place, is_scored in enumerate(mask) if is_scored]
        if not predicted:
            yield None
            continue
        start, last = predicted[0], predicted[-1]
        if last - start + 1 > len(predicted):
            raise ValueError(
                "a row is trained on in several parts, and a teacher with other tokens reads one "
                "prompt and one completion: set data.train_on: last or each, or leave the row out"
            )
        is_apart = bool(apart and apart[number])
        yield {
            "ids": ids[number][: last + 1],
            "start": start,
            "prompt": _prompt(batch, number, is_apart),
            "apart": is_apart,
            "generated": "completion_mask" in batch,
            "ended": bool(ended and ended[number]),
            "end": _end(batch, number),
        }


def _prompt(batch: Batch, number: int, apart: bool) -> str | None:
    """Return the text that the teacher reads before a completion; None for that of the row's tokens."""
    rendered = batch.get("extra", {}).get(TEACHER_PROMPT)
    if rendered is not None:
        return str(rendered[number])
    # Of a text that goes on, the tokens say where it is cut.
    return batch["prompt"][number] if apart and has_prompts(batch) else None


def _end(batch: Batch, number: int) -> str | None:
    """Return the token with which the teacher's template ends an answer; None for its EOS."""
    given = batch.get("extra", {}).get(TEACHER_END)
    return None if given is None or given[number] is None else str(given[number]) or None


def own_batch(
    rows: Sequence[AlignedRow | None], batch: Batch, padding: int, *, starts_alone: bool
) -> Batch:
    """Return the rows as a micro-batch in the teacher's tokens, labeled where it is asked.

    Args:
        rows: The rows.
        batch: The student's, of which further columns go along.
        padding: Fills up the rows.
        starts_alone: Whether the first token of each chunk alone is labeled.
    """
    ids = [[padding] if row is None else row.ids for row in rows]
    labels = [[IGNORE_INDEX] if row is None else _labels(row, starts_alone) for row in rows]
    own: dict[str, Any] = {
        "input_ids": pad_rows(ids, padding),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        "labels": pad_rows(labels, IGNORE_INDEX),
    }
    device = batch["input_ids"].device
    own = {name: to_device(tensor, device) for name, tensor in own.items()}
    also = ("row", "sample", "document", "extra")
    return cast(Batch, own | {name: batch[name] for name in also if name in batch})  # type: ignore[literal-required]


def _labels(row: AlignedRow, starts_alone: bool) -> list[int]:
    """Return the tokens of a row that are asked about, ``IGNORE_INDEX`` for others."""
    labels = [IGNORE_INDEX] * len(row.ids)
    last = -1
    for place, chunk in enumerate(row.chunks.second, row.start):
        if chunk >= 0 and (not starts_alone or chunk != last):
            labels[place] = row.ids[place]
        last = chunk
    return labels


def chunk_numbers(rows: Sequence[AlignedRow | None]) -> tuple[list[int], ...]:
    """Return what an answer says of chunks, numbered over all rows.

    Returns:
        The chunk of each scored token; the places of the first and of the last token of each chunk;
        the chunk of each of the teacher's labeled tokens; the first chunk that each scored token has
        a part in.
    """
    chunks: list[int] = []
    of_tokens: list[int] = []
    since: list[int] = []
    before = 0
    for row in rows:
        if row is not None:
            chunks += [number + before if number >= 0 else -1 for number in row.chunks.first]
            of_tokens += [number + before for number in row.chunks.second if number >= 0]
            since += [number + before if number >= 0 else -1 for number in row.since]
            before += row.chunks.count
    ends = dict(zip(chunks, range(len(chunks)), strict=True))
    starts = dict(zip(reversed(chunks), reversed(range(len(chunks))), strict=True))
    numbers = range(before)
    return chunks, [starts[n] for n in numbers], [ends[n] for n in numbers], of_tokens, since
