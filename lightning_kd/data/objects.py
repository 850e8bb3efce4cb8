"""Rows that a user hands over as Python objects: data sets of ``datasets``, and lists of dicts."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets

if TYPE_CHECKING:
    RowsSource = str | datasets.Dataset | Sequence[Mapping[str, Any]]
    RowsLike = os.PathLike[str] | RowsSource
else:
    # What a command line and its help offer: all that can be written there.
    RowsSource = str
    RowsLike = str

_AT_ONCE = 1000
"""Rows that are hashed together."""


def source_of(source: Any, name: str) -> Any:
    """Return data that is given as a path or hub name, or as rows; paths as text.

    Args:
        source: What was given; None for nothing.
        name: Its argument.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, source))
        raise ValueError(
            f"{name} is a {type(source).__name__} with the splits {splits}; give one of them, as "
            f"{name}=dataset[...]"
        )
    rows = isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source)
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if source is None or isinstance(source, str | datasets.Dataset) or rows:
        return source
    what = f"a {type(source).__name__}"
    if isinstance(source, Sequence):
        number, row = next((i, r) for i, r in enumerate(source) if not isinstance(r, Mapping))
        what += f" whose row {number} is a {type(row).__name__}"
    raise ValueError(
        f"{name} is {what}; give a file, a directory, a hub name, a datasets.Dataset, or a list of "
        "dicts, one for each row (of an iterable data set, list(...) or Dataset.from_generator; of a "
        "DataFrame, Dataset.from_pandas)"
    )


def of_list(rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a list with its place.

    Example:
        >>> list(of_list([{"text": "a"}], "train"))
        [('train[0]', {'text': 'a'})]
    """
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", dict(row)


def content_digest(rows: datasets.Dataset | Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of what rows hold, whichever object holds it.

    Example:
        >>> content_digest([{"text": "a"}]) == content_digest([{"text": "b"}])
        False
    """
    hashed = hashlib.blake2b(digest_size=16)
    if isinstance(rows, datasets.Dataset):
        parts: Iterator[Any] = rows.with_format(None).iter(_AT_ONCE)
    else:
        parts = map(dict, rows)
    for part in parts:
        hashed.update(json.dumps(part, sort_keys=True, default=repr).encode() + b"\n")
    return hashed.hexdigest()
