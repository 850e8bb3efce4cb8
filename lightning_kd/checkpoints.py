"""Checkpoints that are complete or not there at all."""

import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_kd.integrity import check_directory, check_file, read_about

RUN_KEY = "lightning_kd"
"""Key of a checkpoint for the method and the settings of its run."""

_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(ValueError, KeyError, TypeError, AttributeError),
)
"""Errors of reading a damaged file."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside the old one, and put it in its place when all of it is on the disk.

    Lightning's own writes it to the temporary directory and moves it, which copies where that is
    another disk: a process that is killed meanwhile leaves half a file under the old name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it cannot be written; what was there before still is.
        """
        if "://" in str(path):  # an object store shows nothing but complete objects
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        fresh = fresh_name(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(fresh, place)
        except (OSError, RuntimeError) as error:
            fresh.unlink(missing_ok=True)
            # torch reports the failing write only as the context of its own complaint.
            cause = error if isinstance(error, OSError) else error.__context__ or error
            earlier = sorted(place.parent.glob("*.ckpt"))
            kept = f"earlier ones are complete: {', '.join(map(str, earlier))}" if earlier else ""
            raise OSError(
                f"the checkpoint {place} could not be written ({cause}); make room or choose "
                f"another directory, and resume with --ckpt_path. {kept or 'There is no earlier one'}"
            ) from error

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, unless ``weights_only=False`` says so.

        Raises:
            ValueError: If it is none.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a directory. If processes have written their shards there, read it with "
                "the strategy that wrote it; --trainer.strategy fsdp2 needs no more than one process"
            )
        with explained(path):
            if "://" not in str(path):
                check_file(Path(path))
            safe = True if weights_only is None else weights_only
            return super().load_checkpoint(path, map_location, safe)


def fresh_name(place: Path) -> Path:
    """Return the name of a checkpoint while it is written."""
    return place.with_name(f"{place.name}.fresh")


def put_in_place(fresh: Path, place: Path) -> None:
    """Give a complete checkpoint its name, whose last bearer goes.

    Only a file takes the name of a file at once; otherwise :func:`readable_checkpoint` finds the last
    bearer where a process is killed in between.
    """
    old = _old(place)
    if place.is_dir() or (fresh.is_dir() and place.exists()):
        _remove(old)
        place.rename(old)
    fresh.replace(place)
    _remove(old)


def readable_checkpoint(path: Path) -> Path:
    """The checkpoint, or what it was to replace when the process was killed between two renamings."""
    if path.exists() or not path.name:
        return path
    old = _old(path)
    return old if old.exists() else path


def newest_complete(near: Path) -> Path | None:
    """Return the newest checkpoint beside another one that is complete, or None."""
    others = [path for path in near.parent.glob("*.ckpt*") if path not in {near, fresh_name(near)}]
    others = [path for path in others if path.suffix in {".ckpt", ".old"}]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if path.is_dir():
                check_directory(path, read_about(path)["checksums"])
            else:
                check_file(path)
        except (OSError, ValueError):
            continue
        return path
    return None


def summarize(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer steps of a checkpoint, and the path of the best one that it knows.

    Weights alone know nothing of callbacks.
    """
    states = checkpoint.get("callbacks", {}).values()
    monitored = [s for s in states if isinstance(s, dict) and s.get("monitor")]
    best = next((s["best_model_path"] for s in monitored if s.get("best_model_path")), None)
    step, alone = checkpoint.get("global_step", 0), "callbacks" not in checkpoint
    return {"step": step, "best": best, "weights_only": alone}


def weights_alone() -> ValueError:
    """Return the error for training that would continue from weights alone."""
    return ValueError(
        "the checkpoint holds weights alone (save_weights_only): without the state of the "
        "optimizer, schedule and loops training cannot go on. Resume from another checkpoint "
        "of the run; validate, test and predict take this one"
    )


def compare_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Validate that weights are those of the same model.

    Raises:
        ValueError: If one is missing, or has another shape.
    """
    compare_shapes({n: t.shape for n, t in saved.items()}, {n: t.shape for n, t in own.items()})


def compare_shapes(saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> None:
    """Validate shapes alone, if no weights are at hand.

    Raises:
        ValueError: If a weight is missing, or has another shape.
    """
    found = {name: tuple(shape) for name, shape in saved.items()}
    expected = {name: tuple(shape) for name, shape in own.items()}
    unequal = [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]
    if unequal:
        name = unequal[0]
        raise ValueError(
            f"the checkpoint is of another student: {len(unequal)} weights differ, {name} for one is "
            f"{found.get(name, 'not there')} in the checkpoint and {expected.get(name, 'not there')} "
            "in this run. Give the model that it was trained with"
        )


@contextmanager
def explained(path: _PATH) -> Iterator[None]:
    """Turn what the reading of a file may raise into one error that names it.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise unsafe(path, error) from error


def unsafe(path: _PATH, error: BaseException) -> ValueError:
    """Return the error for a file or directory that is not loaded."""
    (reason, *_) = str(error).splitlines() or [type(error).__name__]
    other = newest_complete(Path(path))
    way_out = (
        f"The newest complete one beside it is {other}" if other else "None beside it is complete"
    )
    return ValueError(
        f"{path} is no checkpoint that can be read safely: {reason[:200]}. {way_out}; give one that "
        "this library has written, from a source that you trust"
    )


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
