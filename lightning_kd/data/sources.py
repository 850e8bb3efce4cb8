"""Rows from files and hubs, through ``datasets``; whatever is wrong with one names its place."""

import csv
import json
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

WHERE = "__where__"
"""Column with the place of each row: ``train.jsonl:17``."""


_FORMAT = 1
"""Changes with what :func:`load_rows` makes of a file: an older cache is not used then."""


def load_rows(
    path: str,
    required: dict[str, type],
    *,
    optional: tuple[str, ...] = (),
    split: str = "train",
    subset: str | None = None,
) -> datasets.Dataset:
    """Load the columns that are asked for, and where each row came from.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file, a glob of such files,
            a directory that ``datasets`` wrote or understands, or the name of a data set on the hub.
        required: Columns that must be there, and the type of their values (``str`` or ``list``).
        optional: Columns that are taken along where they exist.
        split: Split of a hub data set or directory; a file is one split.
        subset: Configuration of a hub data set.

    Returns:
        The rows, with the column :data:`WHERE`.

    Raises:
        ValueError: If there is no such data, a column is missing, a value has the wrong type, a line
            is not JSON, or there are no rows. The message names file and line.
    """
    if _is_file(path):
        rows = datasets.concatenate_datasets(
            [_from_file(Path(name), required, optional) for name in _files(path)]
        )
    else:
        rows = _from_datasets(path, required, optional, split, subset)
    if len(rows) == 0:
        raise ValueError(f"{path} has no rows; training and evaluation need at least one")
    return rows


def check_value(value: Any, expected: type, column: str, where: str) -> None:
    """One value of a row.

    Raises:
        ValueError: If it is missing or has another type.
    """
    if not isinstance(value, expected):
        got = "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
        wanted = "text" if expected is str else "a list"
        raise ValueError(f"{where}: column {column!r} must be {wanted}, got {got}")


def _is_file(path: str) -> bool:
    return has_magic(path) or Path(path).suffix in _READERS


def _files(path: str) -> list[str]:
    found = sorted(glob(path)) if has_magic(path) else [path]
    missing = [name for name in found if not Path(name).is_file()]
    if missing or not found:
        raise ValueError(f"the data file {path!r} does not exist (working directory: {Path.cwd()})")
    unknown = [name for name in found if Path(name).suffix not in _READERS]
    if unknown:
        raise ValueError(f"cannot read {unknown[0]!r}; known endings: {', '.join(_READERS)}")
    return found


def _from_file(
    path: Path, required: dict[str, type], optional: tuple[str, ...]
) -> datasets.Dataset:
    if path.suffix == ".parquet":
        rows = datasets.Dataset.from_parquet(str(path))
        return _checked(rows, required, optional, lambda row: f"{path}: row {row + 1}", str(path))
    status = path.stat()
    try:
        # The stamp is part of the cache's key: a changed file is read again.
        return datasets.Dataset.from_generator(
            _generate,
            gen_kwargs={
                "path": str(path),
                "required": required,
                "optional": optional,
                "stamp": [(_FORMAT, status.st_mtime_ns, status.st_size)],
            },
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise ValueError(f"cannot read {path}: {error.__cause__ or error}") from error


def _generate(
    path: str,
    required: dict[str, type],
    optional: tuple[str, ...],
    stamp: list[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    empty = True
    for where, row in _READERS[Path(path).suffix](path):
        for column, expected in required.items():
            if column not in row:
                raise ValueError(f"{where}: column {column!r} is missing; there are {sorted(row)}")
            check_value(row[column], expected, column, where)
        empty = False
        yield {k: row.get(k) for k in (*required, *optional)} | {WHERE: where}
    if empty:
        raise ValueError(f"{path} has no rows; training and evaluation need at least one")


def _json(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Path(path).open(encoding="utf-8") as file:
        if Path(path).suffix == ".json" and file.read(1).lstrip() in {"[", ""}:
            file.seek(0)
            for number, row in enumerate(json.load(file), 1):
                yield f"{path}: row {number}", _object(row, f"{path}: row {number}")
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error
            yield f"{path}:{number}", _object(row, f"{path}:{number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _csv(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise ValueError(f"{where}: more cells than the header has columns")
            yield where, row


def _text(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    text = Path(path).read_text(encoding="utf-8")
    if text.strip():
        yield path, {"text": text}


_READERS: dict[str, Callable[[str], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _json,
}


def _from_datasets(
    path: str,
    required: dict[str, type],
    optional: tuple[str, ...],
    split: str,
    subset: str | None,
) -> datasets.Dataset:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().exists():
        raise ValueError(
            f"the data {path!r} does not exist; give a file ({', '.join(_READERS)}), a directory, "
            "or a hub name such as 'openai/gsm8k'"
        )
    try:
        if (Path(path) / "state.json").exists():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot load the data set {path!r}: {error}") from error
    return _checked(rows, required, optional, lambda row: f"{path}[{row}]", path)


def _checked(
    rows: datasets.Dataset,
    required: dict[str, type],
    optional: tuple[str, ...],
    where: Callable[[int], str],
    name: str,
) -> datasets.Dataset:
    for column in required:
        if column not in rows.column_names:
            raise ValueError(f"{name}: column {column!r} is missing; there are {rows.column_names}")
    rows = rows.select_columns([*required, *(c for c in optional if c in rows.column_names)])
    for index, row in enumerate(rows):
        for column, expected in required.items():
            check_value(row[column], expected, column, where(index))
    return rows.add_column(WHERE, [where(index) for index in range(len(rows))])
