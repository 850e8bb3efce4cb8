"""Minimal pairs: a sentence that is acceptable, and one that is not."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

GOOD, BAD = "sentence_good", "sentence_bad"


@dataclass(frozen=True)
class MinimalPairs:
    """The pairs of one file of BLiMP, a paradigm."""

    name: str
    """Of the file, without its ending."""
    good: tuple[str, ...]
    bad: tuple[str, ...]
    field: str | None = None
    """Field of linguistics (``syntax``), if the file names it."""
    phenomenon: str | None = None
    """Phenomenon (``island_effects``), if the file names it as ``linguistics_term``."""

    def first(self, limit: int | None) -> "MinimalPairs":
        """Return the first pairs alone; all without a limit."""
        return MinimalPairs(
            self.name, self.good[:limit], self.bad[:limit], self.field, self.phenomenon
        )


def read_minimal_pairs(directory: str | Path) -> list[MinimalPairs]:
    """Read the ``.jsonl`` files of a directory, in the order of their names.

    Raises:
        ValueError: If there are none, a line is no object with two sentences, or no pair of a file has
            two different ones (seven of BLiMP's have not).
    """
    paths = sorted(Path(directory).expanduser().glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"there are no .jsonl files of minimal pairs in {str(directory)!r}; give the directory of "
            f"BLiMP's files, each with {GOOD} and {BAD} on every line"
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> MinimalPairs:
    if not path.stat().st_size:
        raise ValueError(f"{path} has no minimal pairs")
    pairs: list[tuple[str, str]] = []
    names: tuple[str | None, str | None] = (None, None)
    # A line ends with "\n" alone: JSON may have U+2028 and the like in a text as they are.
    for number, line in enumerate(_text_of(path).removesuffix("\n").split("\n"), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
        found = [record.get(key) for key in (GOOD, BAD)] if isinstance(record, dict) else []
        if not all(isinstance(text, str) and text for text in found):
            raise ValueError(
                f"{path}, line {number}: a minimal pair is an object with two texts, {GOOD} and {BAD}; "
                f"got {line[:120]}"
            )
        if not pairs:
            names = _name(record, "field", path), _name(record, "linguistics_term", path)
        pairs.append((str(found[0]), str(found[1])))
    if all(acceptable == other for acceptable, other in pairs):
        raise ValueError(f"{path} has no pair of two different sentences")
    good, bad = zip(*pairs, strict=True)
    return MinimalPairs(path.stem, good, bad, *names)


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not written in UTF-8: {error}") from error


def _name(record: dict[str, object], key: str, path: Path) -> str | None:
    found = record.get(key)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise ValueError(
            f"{path}, line 1: {key} is {found!r:.80}; it must be the name of a group, or left out"
        )
    return found


def groups_of(file: MinimalPairs) -> tuple[str, ...]:
    """Return the names of the means that a file is part of.

    A field and a phenomenon of one name (``morphology``) are the same group once; BLiMP writes one
    field in two ways, ``syntax_semantics`` and ``syntax/semantics``.
    """
    named = [name.replace("/", "_") for name in (file.field, file.phenomenon) if name is not None]
    return ("blimp", *(f"blimp_{name}" for name in dict.fromkeys(named)))


def group_names(files: Sequence[MinimalPairs]) -> tuple[str, ...]:
    """Return the names of :func:`accuracies`."""
    return tuple(dict.fromkeys(name for file in files for name in groups_of(file)))


def accuracies(files: Sequence[MinimalPairs], good: Tensor, bad: Tensor) -> dict[str, float]:
    """Return the share of pairs whose acceptable sentence is the likelier one.

    Args:
        files: The pairs.
        good: Log-likelihoods of the acceptable sentences of all files, in order, ``(pairs,)``.
        bad: Those of the others. A tie is no success; of a NaN nothing is known, and the share is NaN.

    Returns:
        ``blimp``, the mean over files; ``blimp_FIELD`` and ``blimp_PHENOMENON``, the means over their
        files.

    Example:
        >>> import torch
        >>> files = [
        ...     MinimalPairs("one", ("a", "b"), ("c", "d"), "syntax", "binding"),
        ...     MinimalPairs("two", ("a",), ("c",), "semantics", "quantifiers"),
        ... ]
        >>> accuracies(files, torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -0.5, -3.0]))
        ... # doctest: +NORMALIZE_WHITESPACE
        {'blimp': 0.75, 'blimp_syntax': 0.5, 'blimp_binding': 0.5, 'blimp_semantics': 1.0,
         'blimp_quantifiers': 1.0}
    """
    shares: dict[str, list[float]] = defaultdict(list)
    unknown = good.isnan() | bad.isnan()
    won = (good > bad).double().masked_fill(unknown, torch.nan)
    start = 0
    for file in files:
        own = slice(start, start + len(file.good))
        start = own.stop
        for name in groups_of(file):
            shares[name].append(won[own].mean().item())
    return {name: sum(values) / len(values) for name, values in shares.items()}
