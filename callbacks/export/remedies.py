"""What to type after an export has failed."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


def after_failed_write(trainer: L.Trainer) -> str:
    """Return how to export the trained student elsewhere."""
    newest = _newest_checkpoint(trainer)
    if newest is None:
        return "There is no checkpoint of it: no ModelCheckpoint has saved one"
    return (
        f"Nothing is lost: make room, and give the same command with --ckpt_path {newest} and "
        "--export.dirpath for another directory"
    )


def after_failed_push(trainer: L.Trainer, name: str, log_dir: str | None) -> str:
    """Return how to push from a checkpoint; empty where there is none."""
    newest = _newest_checkpoint(trainer)
    if newest is None:
        return ""
    config = Path(log_dir or ".") / "config.yaml"
    given = f" --config {config}" if config.exists() else ""
    return (
        f"\nor, from a checkpoint, with\n  lightning-kd export{given} --ckpt_path {newest} "
        f"--export.push_to_hub {name}"
    )


def _newest_checkpoint(trainer: L.Trainer) -> str | None:
    saved = [
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.last_model_path, callback.best_model_path)
        if path and Path(path).exists()
    ]
    return max(saved, key=lambda path: Path(path).stat().st_mtime, default=None)
