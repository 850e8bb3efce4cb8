"""Readers of files, row by row; errors name the place of the row."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]

Row = tuple[str, dict[str, Any]]
"""The place of a row, ``train.jsonl:17``, and its columns."""

_LONGEST_CELL = 2**31 - 1
"""Python's own limit of a CSV cell, 131,072 characters, is shorter than a document."""


def read_json(path: str) -> Iterator[Row]:
    """One object on each line, or, in a ``.json`` file, also one list of objects.

    Raises:
        ValueError: If a line is not JSON or holds no object.
    """
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if ending(path) == ".json" and first.lstrip().startswith("["):
        text = "".join(line for _, line in _lines(path))
        for number, row in enumerate(_parsed(text, path, 1), 1):
            yield f"{path}: row {number}", _object(row, f"{path}: row {number}")
        return
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _object(_parsed(line, path, number), f"{path}:{number}")


def read_csv(path: str, delimiter: str = ",") -> Iterator[Row]:
    """A header, and one row for each record; every cell is text.

    Raises:
        ValueError: If the header names a column twice, a row has more cells than it, or the file is
            not CSV.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    end = 0
    try:
        for cells in reader:
            # The line a record begins on: a quoted cell may go over several.
            where, end = f"{path}:{end + 1}", reader.line_num
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: the header names a column twice: {header}")
            elif len(cells) > len(header):
                raise ValueError(f"{where}: more cells than the header has columns")
            else:
                yield where, dict.fromkeys(header) | dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path}:{end + 1}: not valid CSV: {error}") from error


def read_parquet(path: str) -> Iterator[Row]:
    """The rows of a table, counted from 1.

    Raises:
        ValueError: If the file is not Parquet.
    """
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid Parquet: {error}") from error
    with table:
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


def read_text(path: str) -> Iterator[Row]:
    """The whole file, as one document in the column ``text``."""
    text = "".join(line for _, line in _lines(path)).replace("\r\n", "\n")
    if text.strip():
        yield path, {"text": text}


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".txt": read_text,
}
"""Reader of a file, by its ending."""

_COMPRESSED = ".gz"

KNOWN_ENDINGS = f"{', '.join(READERS)}; also with {_COMPRESSED} behind, but for .parquet"


def ending(path: str) -> str:
    """Return the ending of a file in :data:`READERS`, without that of its compression, or none.

    Example:
        >>> ending("train.jsonl.gz"), ending("train.parquet"), ending("train.xlsx")
        ('.jsonl', '.parquet', '')
    """
    name = Path(path).name
    bare = name.removesuffix(_COMPRESSED)
    found = Path(bare).suffix
    compressed_inside = found == ".parquet" and bare != name
    return found if found in READERS and not compressed_inside else ""


def _lines(path: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path) if path.endswith(_COMPRESSED) else Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                # Spreadsheets write a byte order mark, which belongs to no column.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1} "
            "of the line; convert the file to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}:{number + 1}: not a whole gzip file: {error}; compress it again, or copy it again"
        ) from error


def _parsed(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not valid JSON: {error.msg}") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row
