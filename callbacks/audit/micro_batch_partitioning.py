"""Splitting of batches into samples, and joining of samples into micro-batches."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.collectives import gather_objects

_LABELS = {"labels", "label", "targets", "target"}
_MASKS = {"attention_mask", "mask", "padding_mask"}


def num_rows(batch: Any) -> int:
    """Return the number of samples: the length of labels or ids, or else that of most tensors.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    lengths = {path: len(tensor) for path, tensor in iterate_tensors(batch) if tensor.ndim}
    if not lengths:
        raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor with rows")
    for name in ("input_ids", "labels"):
        if (name,) in lengths:
            return lengths[(name,)]
    return Counter(lengths.values()).most_common(1)[0][0]


def clone_batch(batch: Any) -> Any:
    """Return a copy of a batch whose keys and tensors can be changed without changing the batch."""
    return apply_to_collection(batch, Tensor, torch.clone)


def split_rows(batch: Any) -> list[Any]:
    """Return batches of one sample each."""
    count = num_rows(batch)
    return [_pick(batch, slice(row, row + 1), count) for row in range(count)]


def join_batches(batches: Sequence[Any]) -> Any:
    """Join batches into one; shorter rows are padded on the right, labels with IGNORE_INDEX.

    Raises:
        ValueError: If rows must be padded, and no name or value tells labels from inputs.
    """
    tensors = [dict(iterate_tensors(batch)) for batch in batches]
    ragged = any(
        len({t[path].shape[1:] for t in tensors if path in t}) > 1
        for path, tensor in tensors[0].items()
        if tensor.ndim > 1
    )
    known = {str(path[-1]) for path in tensors[0]} & (_LABELS | _MASKS)
    if ragged and not known and not any(_holds_ignored(t) for ts in tensors for t in ts.values()):
        raise ValueError(
            "its micro-batches have rows of different lengths, and no name or value tells labels "
            "from inputs to pad them; use a mapping with labels or attention_mask, or labels of "
            f"{IGNORE_INDEX}"
        )
    return _join(batches, [num_rows(batch) for batch in batches], "")


def append_padding(batch: Any, columns: int, *, attended: bool = False) -> Any:
    """Append columns without labels to a language-model batch; return any other unchanged.

    Args:
        batch: A mapping with an attention mask, or anything else.
        columns: Number of columns.
        attended: Whether the mask marks them as text; they then repeat the last token.
    """
    if padded_length(batch) is None:
        return batch
    width = padded_length(batch)
    widened = {
        key: _append_columns(key, value, columns, attended)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width
    }
    return _rebuild(batch, widened)


def padded_length(batch: Any) -> int | None:
    """Return the length of a padded row; None for a batch without an attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None


def partition(samples: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Join consecutive samples into micro-batches of the given sizes."""
    groups, start = [], 0
    for size in sizes:
        groups.append(join_batches(samples[start : start + size]))
        start += size
    return groups


def gather_batches(window: Sequence[Any], device: torch.device) -> list[list[Any]]:
    """Return the micro-batches of all processes, on this process's device: one list for each."""
    gathered = gather_objects(move_data_to_device(list(window), "cpu"))
    return [move_data_to_device(part, device) for part in gathered]


def iterate_tensors(
    value: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield each tensor of a batch with its path: the keys and indices that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from iterate_tensors(item, (*path, key))
    elif isinstance(value, tuple | list):
        for key, item in enumerate(value):
            yield from iterate_tensors(item, (*path, key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from iterate_tensors(getattr(value, field.name), (*path, field.name))


def _holds_ignored(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and bool((tensor == IGNORE_INDEX).any())


def _is_per_row(value: Any, count: int) -> bool:
    """Return whether a list has one item for each row, rather than one for each field."""
    fields = all(isinstance(v, Tensor) and v.ndim and len(v) == count for v in value)
    return len(value) == count and not (fields and count > 0)


def _rebuild(mapping: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    if not isinstance(mapping, MutableMapping):
        return {**mapping, **items}
    copied = copy.copy(mapping)
    for key, item in items.items():
        copied[key] = item
    return copied


def _rebuild_tuple(value: Any, items: Sequence[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _pick(value: Any, rows: slice, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        if "labels" in value and num_rows(value) != count:
            raise ValueError(
                f"a batch of {count} rows holds another of {num_rows(value)}, which cannot be split "
                "with it; give both the same number of rows"
            )
        return _rebuild(value, {key: _pick(item, rows, count) for key, item in value.items()})
    if isinstance(value, tuple):
        return _rebuild_tuple(value, [_pick(item, rows, count) for item in value])
    if isinstance(value, list):
        if _is_per_row(value, count):
            return value[rows]
        return [_pick(item, rows, count) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        picked = {name: _pick(getattr(value, name), rows, count) for name in names}
        return dataclasses.replace(value, **picked)
    return value


def _join(values: Sequence[Any], counts: Sequence[int], key: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        per_row = all(v.ndim and len(v) == n for v, n in zip(values, counts, strict=True))
        return _concatenate(values, key) if per_row else first
    if isinstance(first, Mapping):
        return _rebuild(
            first, {k: _join([value[k] for value in values], counts, str(k)) for k in first}
        )
    if isinstance(first, tuple):
        items = [_join([v[k] for v in values], counts, key) for k in range(len(first))]
        return _rebuild_tuple(first, items)
    if isinstance(first, list):
        if all(_is_per_row(value, count) for value, count in zip(values, counts, strict=True)):
            return [item for value in values for item in value]
        return [_join([v[k] for v in values], counts, key) for k in range(len(first))]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        joined = {name: _join([getattr(v, name) for v in values], counts, name) for name in names}
        return dataclasses.replace(first, **joined)
    return first


def _concatenate(values: Sequence[Tensor], key: str) -> Tensor:
    ignored = key in _LABELS or any(_holds_ignored(v) for v in values)
    sizes = [max(v.shape[dim] for v in values) for dim in range(1, values[0].ndim)]
    widened = []
    for value in values:
        missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
        padding = [amount for size in reversed(missing) for amount in (0, size)]
        widened.append(F.pad(value, padding, value=IGNORE_INDEX if ignored else 0))
    return torch.cat(widened)


def _append_columns(key: Any, value: Tensor, columns: int, attended: bool) -> Tensor:
    padding = [0, 0] * (value.ndim - 2) + [0, columns]
    if key in _LABELS:
        return F.pad(value, padding, value=IGNORE_INDEX)
    if not attended:
        return F.pad(value, padding, value=0)
    if key in _MASKS:
        return F.pad(value, padding, value=1)
    if key == "input_ids":
        last = (value != 0).cumsum(1).argmax(1)
        return torch.cat([value, value.gather(1, last[:, None]).expand(-1, columns)], 1)
    return F.pad(value, padding, value=0)
