"""Cutting a batch into samples, and joining samples into batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.types import IGNORE_INDEX


def rows_of(batch: Any) -> int:
    """Number of samples of a batch: the length of its first tensor.

    Raises:
        ValueError: If there is no tensor in it.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"cannot cut a batch of type {type(batch).__name__}: it holds no tensor")


def split_rows(batch: Any) -> list[Any]:
    """The batch as batches of one sample."""
    return [_pick(batch, slice(row, row + 1), rows_of(batch)) for row in range(rows_of(batch))]


def _pick(value: Any, rows: slice, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _pick(item, rows, count) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_pick(item, rows, count) for item in value)
    if isinstance(value, list):
        if len(value) == count and not any(isinstance(item, Tensor) for item in value):
            return value[rows]
        return [_pick(item, rows, count) for item in value]
    return value


def join_rows(batches: Sequence[Any]) -> Any:
    """One batch of all samples; shorter rows are padded on the right, labels with IGNORE_INDEX."""
    return _join(batches, 0)


def _join(values: Sequence[Any], fill: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim:
        width = max((v.shape[1] for v in values), default=0) if first.ndim > 1 else 0
        return torch.cat([_widen(v, width, fill) if first.ndim > 1 else v for v in values])
    if isinstance(first, Mapping):
        fills = {key: IGNORE_INDEX if key == "labels" else 0 for key in first}
        return {key: _join([v[key] for v in values], fills[key]) for key in first}
    if isinstance(first, tuple):
        return tuple(_join([v[k] for v in values], fill) for k in range(len(first)))
    if isinstance(first, list):
        return [item for value in values for item in value]
    return first


def _widen(value: Tensor, width: int, fill: int) -> Tensor:
    padding = [0, 0] * (value.ndim - 2) + [0, width - value.shape[1]]
    return F.pad(value, padding, value=fill)


def pad_rows(batch: Any, columns: int) -> Any:
    """A language-model batch with more padding; any other batch as it is."""
    if not isinstance(batch, Mapping) or "attention_mask" not in batch:
        return batch
    width = batch["attention_mask"].shape[1]
    return {
        key: _widen(value, width + columns, IGNORE_INDEX if key == "labels" else 0)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width
        else value
        for key, value in batch.items()
    }


def regroup(samples: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """The samples in micro-batches of the sizes of ``like``."""
    groups, start = [], 0
    for part in like:
        end = start + rows_of(part)
        groups.append(join_rows(samples[start:end]))
        start = end
    return groups


def from_all_ranks(window: Sequence[Any]) -> list[Any]:
    """The micro-batches of every rank, on every rank."""
    world_size = torch.distributed.get_world_size()
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, list(window))
    return [part for parts in gathered for part in parts]
