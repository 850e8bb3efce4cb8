"""What a run prints that is neither progress nor an error."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_kd.named_checkpoints import step_of


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
    directory = trainer.log_dir  # all processes ask each other, and nodes may share no folder
    if directory is None or not Path(directory).is_dir():
        return ""
    place = Path(directory)
    config = place / "config.yaml"
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    saved = [path for c in saving for path in (c.last_model_path, c.best_model_path) if path]
    steps = {path: step_of(Path(path)) for path in dict.fromkeys(saved) if Path(path).exists()}
    lines = [f"The run is in {place}:"]
    lines += ["  config.yaml, what it was told"] if config.exists() else []
    lines += [
        f"  {_short(path, place)}, a checkpoint of step {step}" for path, step in steps.items()
    ]
    lines += ["Next:"]
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        lines += [f"  tensorboard --logdir {quote(str(place.parent))}"]
    if steps and config.exists():
        newest = max(steps, key=lambda path: steps[path])  # the first of several
        from_there = f"--config {quote(str(config))} --ckpt_path {quote(newest)}"
        commands = [
            f"  lightning-kd validate {from_there}" if trainer.enable_validation else "",
            f"  lightning-kd export {from_there}",
            f"  lightning-kd fit {from_there} --trainer.max_steps {2 * trainer.global_step}",
        ]
        lines += filter(None, commands)
        if steps[newest] < trainer.global_step:
            lines += [
                f"(The run took {trainer.global_step} steps; no checkpoint has been saved since step "
                f"{steps[newest]}.)"
            ]
    return "\n".join(lines if lines[-1] != "Next:" else lines[:-1])


def whose_weights(module: L.LightningModule, configs: Sequence[object]) -> str:
    """Return whose weights are evaluated without a checkpoint; empty if the method says it.

    Args:
        module: The method.
        configs: Configuration files of the command.
    """
    spec = getattr(module, "student_spec", None)
    if spec is None or spec.name_or_path is None:
        return ""
    text = f"The student's weights are those of {spec.name_or_path}"
    runs = [Path(str(file)) for file in configs if Path(str(file)).name == "config.yaml"]
    if runs:
        text += f", not those of the run in {runs[-1].parent}: --ckpt_path last takes these"
    return text


def _short(path: str, place: Path) -> str:
    there = Path(path).resolve()
    return str(
        there.relative_to(place.resolve()) if there.is_relative_to(place.resolve()) else path
    )
