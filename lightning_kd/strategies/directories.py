"""Checkpoints that all processes write to one directory."""

import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import safe_globals

from lightning_kd.checkpoints import (
    RUN_KEY,
    compare_shapes,
    fresh_name,
    put_in_place,
    summarize,
    unsafe,
    weights_alone,
)
from lightning_kd.collectives import gather_objects
from lightning_kd.integrity import check_directory, checksums, read_about, write_about
from lightning_kd.strategies.gathered_shards import weight_shapes
from lightning_kd.strategies.shard_index import check_indices

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's variable for code that asks for pickle."""

SavedStrategy = Mapping[str, str | int]
"""The strategy that saved a directory, and its options that must not change."""


@contextmanager
def replacing(
    strategy: Strategy, path: Path, saved_strategy: SavedStrategy, checkpoint: Mapping[str, Any]
) -> Iterator[Path]:
    """Yield a directory to write to, which replaces ``path`` when all processes have written.

    Args:
        strategy: The strategy that saves.
        path: The name of the checkpoint.
        saved_strategy: Strategy and options that must be the same when it is loaded.
        checkpoint: The checkpoint, a summary of which is saved beside it.
    """
    fresh, summary = fresh_name(path), summarize(checkpoint)
    run = dict(checkpoint.get(RUN_KEY, {}))  # strategies empty what they are given
    if strategy.is_global_zero:
        shutil.rmtree(fresh, ignore_errors=True)
    strategy.barrier("checkpoint_begins")
    yield fresh
    strategy.barrier("checkpoint_written")
    shares = gather_objects(checksums(fresh, _share()))
    if strategy.is_global_zero:
        about = {"saved_by": saved_strategy, "weights": _shapes(strategy), "run": run}
        about |= summary
        about["checksums"] = {name: checksum for part in shares for name, checksum in part.items()}
        write_about(fresh, about)
        put_in_place(fresh, path)
    strategy.barrier("checkpoint_in_place")


@contextmanager
def read_safely(
    strategy: Strategy,
    path: Path,
    saved_strategy: SavedStrategy,
    weights_only: bool | None,
    classes: Sequence[type] = (),
) -> Iterator[None]:
    """Check a directory, and execute nothing in it while the context is open.

    torch and DeepSpeed read some of their files with pickle as it is, unless they are forced.

    Args:
        strategy: Has the model that the weights are for.
        path: The directory.
        saved_strategy: Strategy and options of this run.
        weights_only: False where the user trusts it with everything.
        classes: Harmless ones that may be in it, besides tensors and plain values.

    Raises:
        ValueError: If something in it would be executed, is damaged or missing, or it was written by
            another strategy, in another layout, or of another model, or is not one to train on from.
    """
    about, damage = {}, ""
    try:
        about = read_about(path)
        check_directory(path, about["checksums"], _share())
    except (OSError, ValueError) as error:
        damage = str(error)
    # Every process hears of what one has found, and none waits for another that has stopped.
    found = next((said for said in gather_objects(damage) if said), None)
    if found:
        raise unsafe(path, ValueError(found))
    _compare(path, about, saved_strategy, _shapes(strategy))
    if about["weights_only"] and _trains(strategy):
        raise weights_alone()
    compare_run(strategy, about["run"])
    if weights_only is False:
        yield
        return
    check_indices(path)
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise unsafe(path, error) from error
    except CheckpointException as error:  # not even an Exception
        (first, _), *_ = error.failures.values()
        raise unsafe(path, first) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def compare_run(strategy: Strategy, saved: Mapping[str, Any]) -> None:
    """Compare the run that resumes with the one that saved, before anything of it is loaded.

    Raises:
        ValueError: If it differs in what must not change.
    """
    module = strategy.lightning_module
    assert module is not None  # the trainer has connected it
    resumption = getattr(module, "resumption", None)
    if resumption is not None and _trains(strategy):
        resumption.load(None, saved)


def _trains(strategy: Strategy) -> bool:
    module = strategy.lightning_module
    return module is not None and module.trainer.state.fn is TrainerFn.FITTING


def _share() -> slice:
    """The files that this process reads, of all in a directory."""
    if not torch.distributed.is_initialized():
        return slice(None)
    return slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def _shapes(strategy: Strategy) -> dict[str, list[int]]:
    assert strategy.lightning_module is not None  # the trainer has connected it
    return weight_shapes(strategy.lightning_module)


def _compare(
    path: Path, about: Mapping[str, Any], own: SavedStrategy, weights: dict[str, list[int]]
) -> None:
    if about["saved_by"] != own:
        raise ValueError(
            f"{path} was written with {_in_words(about['saved_by'])}, and this run has "
            f"{_in_words(own)}; such a directory is read as it was written"
        )
    compare_shapes(about["weights"], weights)


def _in_words(saved_strategy: SavedStrategy) -> str:
    return ", ".join(f"{name} {value}" for name, value in saved_strategy.items())
