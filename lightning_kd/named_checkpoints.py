"""The checkpoints that a run calls last and best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_kd.checkpoints import explained, readable_checkpoint, summarize, unsafe
from lightning_kd.integrity import read_about

Name = Literal["last", "best"]

_NAMED = 5
"""Checkpoints of a directory that a message names, the newest."""


def find_checkpoint(name: Name, directories: Sequence[Path]) -> Path:
    """Find the last or best checkpoint in the directories of one run.

    Raises:
        ValueError: If there is none.
    """
    found = [p for d in directories for p in sorted(d.glob("*.ckpt*")) if _is_one(p)]
    if not found:
        raise ValueError(
            f"--ckpt_path {name}: there is no checkpoint in "
            f"{' or '.join(map(str, directories)) or 'a directory that the configuration names'}. Give "
            "--config the config.yaml of the run whose checkpoint is meant "
            "(runs/version_N/config.yaml), or --ckpt_path the path of a checkpoint"
        )
    known = {path: _read(path) for path in found}
    last = max(found, key=lambda path: (known[path]["step"], path.stat().st_mtime))
    if name == "last":
        return _named(last)
    telling = [path for path in found if not known[path]["weights_only"]]
    if not telling:
        raise ValueError(
            f"--ckpt_path best: {last} holds weights alone (save_weights_only), which do not say which "
            "are best; give the path of the one that is meant"
        )
    last = max(telling, key=lambda path: (known[path]["step"], path.stat().st_mtime))
    best = known[last]["best"]
    if best is None:
        raise ValueError(
            f"--ckpt_path best: {last} knows of no best checkpoint, for no ModelCheckpoint of its run "
            "has a monitor; use --ckpt_path last, or the path of a checkpoint"
        )
    # A run that was moved still has it under its name.
    places = [Path(best), *(directory / Path(best).name for directory in directories)]
    for place in places:
        if place.exists():
            return place
    raise ValueError(f"--ckpt_path best: {best} does not exist any more; give the path of another")


def checkpoint_places(options: Any) -> list[Path]:
    """Return where a run's checkpoints may be: beside its configuration, and where callbacks save.

    Args:
        options: A command's, as parsed.
    """
    callbacks = options["trainer"]["callbacks"] or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    given = [(callback.get("init_args") or {}).get("dirpath") for callback in listed]
    files = [Path(str(file)) for file in options.get("config") or []]
    beside = [file.parent / "checkpoints" for file in files if file.name == "config.yaml"]
    return [*(Path(place) for place in given if place is not None), *beside[-1:]]


def is_checkpoint(path: str) -> bool:
    """Return whether there is something at a path that may be a checkpoint."""
    found = "://" in path or readable_checkpoint(Path(path)).exists()
    return found and path != ""  # which Path takes for the working directory


def why_no_checkpoint(path: str) -> str:
    """Return why a path is that of a run, not of a checkpoint; empty where it is none of a run."""
    place = Path(path)
    if not path or not place.is_dir() or place.suffix == ".ckpt":
        return ""
    listed = [p for d in (place, place / "checkpoints") for p in d.glob("*.ckpt*") if _is_one(p)]
    newest = sorted(listed, key=lambda p: p.stat().st_mtime, reverse=True)[:_NAMED]
    if newest:
        return f"{path!r} is the directory of a run; give a checkpoint in it: " + " or ".join(
            str(_named(p)) for p in newest
        )
    empty = (place / "config.yaml").is_file() or place.name == "checkpoints"
    return f"{path!r} is the directory of a run without a checkpoint" if empty else ""


def step_of(path: Path) -> int:
    """Return after how many optimizer steps a checkpoint was saved."""
    step: int = _read(path)["step"]
    return step


def _is_one(path: Path) -> bool:
    """Return whether a path is a checkpoint, or one whose replacement was interrupted."""
    return path.suffix == ".ckpt" or (path.suffix == ".old" and not path.with_suffix("").exists())


def _named(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".old" else path


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        try:
            about = read_about(path)
        except ValueError as error:
            raise unsafe(path, error) from error
        return {name: about[name] for name in ("step", "best", "weights_only")}
    with explained(path):
        return summarize(torch.load(path, mmap=True, map_location="cpu", weights_only=True))
