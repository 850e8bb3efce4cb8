"""Rows from files and hubs, through ``datasets``; errors name the place of the row."""

import json
from collections.abc import Callable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path
from types import UnionType
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from lightning_kd.data.objects import RowsLike, content_digest, of_list
from lightning_kd.data.readers import KNOWN_ENDINGS, READERS, Row, ending
from lightning_kd.filesystem import digest_file

WHERE = "__where__"
"""Column with the place of each row: ``train.jsonl:17``."""


TEXTS = str | list[str]
"""Type of a column with a text or a list of texts, which :func:`texts_of` reads."""

Kind = type | UnionType

_FORMAT = 3
"""Version of the rows of :func:`load_rows`: a cache of another version is not used."""


def load_rows(
    path: RowsLike,
    required: Mapping[str, Kind],
    *,
    optional: Mapping[str, Kind] | None = None,
    split: str = "train",
    subset: str | None = None,
) -> datasets.Dataset:
    """Load some columns, and the place that each row came from.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file, a glob of such files,
            a directory that ``datasets`` wrote or understands, the name of a data set on the hub, or
            rows themselves.
        required: Columns that must be there, and the type of their values: ``str``, ``list``,
            ``bool`` or ``str | list[str]``.
        optional: Columns that are taken along where they exist, and their types.
        split: Split of a hub data set or directory; a file is one split. Names rows that were given.
        subset: Configuration of a hub data set.

    Returns:
        The rows, with the column ``__where__``. A list or truth value is written as JSON: a table
        would want all of them to be alike, and one message has a name where another has none.

    Raises:
        ValueError: If there is no such data, a column is missing, a value has the wrong type, a line
            is not JSON, or there are no rows. The message names file and line.
    """
    optional = optional or {}
    if isinstance(path, str) and path.startswith("~"):
        path = str(Path(path).expanduser())
    if not isinstance(path, str) and len(path) == 0:
        raise ValueError(f"{split} has no rows; training and evaluation need at least one")
    if isinstance(path, datasets.Dataset):
        rows = _of_columns(path.with_format(None), split, required, optional)
    elif not isinstance(path, str):
        rows = _table(of_list, required, optional, rows=path, name=split)
    elif has_magic(path) or ending(path) or Path(path).is_file():
        rows = datasets.concatenate_datasets(
            [_from_file(name, required, optional) for name in _files(path)]
        )
    else:
        rows = _from_datasets(path, required, optional, split, subset)
    if len(rows) == 0:
        raise ValueError(f"{path} has no rows; training and evaluation need at least one")
    return rows


def texts_of(cell: str | None, kind: Kind) -> list[str]:
    """Return the texts of a cell that :func:`load_rows` has read as :data:`TEXTS`, or as one text.

    Example:
        >>> texts_of('["a", "b"]', TEXTS), texts_of('"a"', TEXTS), texts_of("a", str)
        (['a', 'b'], ['a'], ['a'])
    """
    if cell is None:
        return []
    found = json.loads(cell) if kind == TEXTS else cell
    return [found] if isinstance(found, str) else list(found)


def digests(path: RowsLike, split: str) -> dict[str, str]:
    """Return a digest of each local file of a path; nothing for a data set of the hub.

    Args:
        path: As for :func:`load_rows`.
        split: Names rows that were given.
    """
    if not isinstance(path, str):
        return {split: content_digest(path)}
    path = str(Path(path).expanduser())
    if Path(path).is_dir():
        files = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
    elif has_magic(path) or ending(path):
        files = _files(path)
    else:
        files = []
    return {name: digest_file(Path(name)) for name in files}


def _files(path: str) -> list[str]:
    found = sorted(glob(path)) if has_magic(path) and not Path(path).exists() else [path]
    missing = [name for name in found if not Path(name).is_file()]
    if missing or not found:
        raise ValueError(f"the data file {path!r} does not exist (working directory: {Path.cwd()})")
    unknown = [name for name in found if not ending(name)]
    if unknown:
        raise ValueError(f"cannot read {unknown[0]!r}; known endings: {KNOWN_ENDINGS}")
    return found


def _from_file(
    path: str, required: Mapping[str, Kind], optional: Mapping[str, Kind]
) -> datasets.Dataset:
    status = Path(path).stat()
    # The stamp is part of the cache's key: a changed file is read again, also one that was put in
    # place of another with its date kept, and so is the file of this name in another directory.
    stamp = (
        _FORMAT,
        str(Path(path).resolve()),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return _table(_of_file, required, optional, path=path, stamp=stamp)


def _of_file(path: str, stamp: tuple[int | str, ...]) -> Iterator[Row]:
    empty = True
    for row in READERS[ending(path)](path):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} has no rows; training and evaluation need at least one")


def _from_datasets(
    path: str,
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind],
    split: str,
    subset: str | None,
) -> datasets.Dataset:
    here = bool(path) and Path(path).exists()
    looks_local = not path or path.startswith((".", "/")) or path.count("/") > 1
    if looks_local and not here:
        raise ValueError(
            f"the data {path!r} does not exist; give a file ({KNOWN_ENDINGS}), a directory, "
            "or a hub name such as 'openai/gsm8k'"
        )
    try:
        if (Path(path) / "dataset_dict.json").exists():
            rows = _split_of(datasets.load_from_disk(path), split, path)
        elif (Path(path) / "state.json").exists():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        nowhere = "" if here else " (and there is no file or directory of this name)"
        raise ValueError(
            f"cannot load the data set {path!r}: {error.__cause__ or error}{nowhere}"
        ) from error
    return _of_columns(rows, path, required, optional)


def _of_columns(
    rows: datasets.Dataset, name: str, required: Mapping[str, Kind], optional: Mapping[str, Kind]
) -> datasets.Dataset:
    wanted = [column for column in (*required, *optional) if column in rows.column_names]
    missing = [column for column in required if column not in wanted]
    if missing:
        raise ValueError(
            f"{name}: column {missing[0]!r} is missing; there are {sorted(rows.column_names)}"
        )
    if not wanted:
        raise ValueError(
            f"{name} has none of the columns {', '.join(optional)}; there are "
            f"{sorted(rows.column_names)}"
        )
    return _table(_of_rows, required, optional, rows=rows.select_columns(wanted), name=name)


def _split_of(splits: datasets.DatasetDict, split: str, path: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(
            f"the directory has no split {split!r}, only {sorted(splits)}; to use one of them, give "
            f"its own directory, as {path}/{min(splits)}"
        )
    return splits[split]


def _of_rows(rows: datasets.Dataset, name: str) -> Iterator[Row]:
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row


def _table(
    read: Callable[..., Iterator[Row]],
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind],
    **source: Any,
) -> datasets.Dataset:
    columns = (*required, *optional, WHERE)
    try:
        return datasets.Dataset.from_generator(
            _checked,
            # Stated, not inferred: what the first rows happen to hold decides nothing.
            features=datasets.Features(dict.fromkeys(columns, datasets.Value("string"))),
            gen_kwargs={
                "read": read,
                "source": source,
                "required": required,
                "optional": optional,
            },
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise ValueError(f"cannot read the data: {error.__cause__ or error}") from error


def _checked(
    read: Callable[..., Iterator[Row]],
    source: dict[str, Any],
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind],
) -> Iterator[dict[str, str | None]]:
    for where, row in read(**source):
        values: dict[str, str | None] = {WHERE: where}
        for column, expected in required.items():
            if column not in row:
                raise ValueError(f"{where}: column {column!r} is missing; there are {sorted(row)}")
            values[column] = _as_text(row[column], expected, f"{where}: column {column!r}")
        for column, expected in optional.items():
            value = row.get(column)
            place = f"{where}: column {column!r}"
            values[column] = None if value is None else _as_text(value, expected, place)
        yield values


_KINDS: dict[Kind, str] = {
    str: "text",
    list: "a list",
    bool: "true or false",
    TEXTS: "text or a list of texts",
}


def _as_text(value: Any, expected: Kind, place: str) -> str:
    texts = value if isinstance(value, list) and value else [value]
    fits = isinstance(value, expected) if expected != TEXTS else all(type(t) is str for t in texts)
    if not fits:
        got = "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
        if (
            expected in (str, TEXTS)
            and isinstance(value, list)
            and value
            and isinstance(value[0], dict)
        ):
            got += "; lists of messages are read by ChatData"
        raise ValueError(f"{place} must be {_KINDS[expected]}, got {got}")
    try:
        text = str(value) if expected is str else json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"{place} cannot be written as text: {error}") from error
    return text
