"""What a run prints that is neither progress nor an error."""

import logging
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger


class _NoTips(logging.Filter):
    """Leaves out what Lightning advertises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "💡 Tip" not in record.getMessage()


_NO_TIPS = _NoTips()


def leave_out_noise() -> None:
    """Silence advertisements, and a deprecation of PyTorch that only Lightning can mend."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_NO_TIPS)
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)


def what_is_left(trainer: L.Trainer) -> str:
    """Return where a run has left what, and the commands that go on from there; empty if nowhere.

    Args:
        trainer: Of the run that has ended.
    """
    if trainer.log_dir is None or not Path(trainer.log_dir).is_dir():
        return ""
    place = Path(trainer.log_dir)
    config = place / "config.yaml"
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    saved = [path for c in saving for path in (c.last_model_path, c.best_model_path) if path]
    lines = [f"The run is in {place}:"]
    lines += ["  config.yaml, what it was told"] if config.exists() else []
    lines += [f"  {_short(path, place)}, a checkpoint" for path in dict.fromkeys(saved)]
    lines += ["Next:"]
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        lines += [f"  tensorboard --logdir {place.parent}"]
    if saved and config.exists():
        from_there = f"--config {config} --ckpt_path {saved[0]}"
        lines += [
            f"  lightning-kd validate {from_there}",
            f"  lightning-kd export {from_there}",
            f"  lightning-kd fit {from_there} --trainer.max_steps {2 * trainer.global_step}",
        ]
    return "\n".join(lines if lines[-1] != "Next:" else lines[:-1])


def _short(path: str, place: Path) -> str:
    there = Path(path).resolve()
    return str(
        there.relative_to(place.resolve()) if there.is_relative_to(place.resolve()) else path
    )
