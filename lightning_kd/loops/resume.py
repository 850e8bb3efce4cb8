"""A run that goes on as if it had not stopped: what Lightning's checkpoints leave out."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_kd.loops.after_validation import decide_after_validation
from lightning_kd.loops.callback_states import stopping_settings, under_new_settings
from lightning_kd.loops.checks import EpochChecks, check_limits
from lightning_kd.loops.fit import (
    ENDED,
    TRAINED,
    VALIDATED,
    EpochLoop,
    FitLoop,
    FitTrainer,
    checkpoint_callbacks,
    early_stoppings,
    epoch_loader,
    validation_interval,
)
from lightning_kd.loops.logs import EarlierRows, forget_steps
from lightning_kd.loops.measurements import Measurements, measurements_of
from lightning_kd.loops.module_hooks import ModuleHooks
from lightning_kd.loops.monitors import MonitorChecks
from lightning_kd.loops.place import place_of
from lightning_kd.loops.requeue import RequeueAfterStep, SavesAfterStep, requeues

CHECKPOINT_KEY = "lightning_kd_run"


def prepare_trainer(trainer: L.Trainer) -> None:
    """Add the loops and the callback of this package to a trainer, once, before it fits.

    Its loops and the trainer itself become those of this package where they stand, with all that was
    set up in them: Lightning has no way to hand it other ones after it was built.

    Raises:
        ValueError: If its limits cannot be kept.
    """
    check_limits(trainer)
    if not any(isinstance(callback, ResumeState) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        # In front of all others, so that a moment is known when they save.
        trainer.callbacks[:0] = [ResumeState(EarlierRows(trainer)), Measurements()]  # type: ignore[attr-defined]
    if requeues(trainer) and not any(isinstance(c, RequeueAfterStep) for c in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.callbacks.append(RequeueAfterStep())  # type: ignore[attr-defined]
    for added in (EpochChecks, MonitorChecks, ModuleHooks):
        if not any(isinstance(callback, added) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(added())  # type: ignore[attr-defined]
    trainer.callbacks.sort(key=_turn)  # type: ignore[attr-defined]
    decide_after_validation(trainer)
    if not isinstance(trainer.fit_loop, FitLoop):
        trainer.fit_loop.__class__ = FitLoop
        trainer.fit_loop.epoch_loop.__class__ = EpochLoop
    if type(trainer) is L.Trainer:
        trainer.__class__ = FitTrainer
    elif not isinstance(trainer, FitTrainer):
        own = type(trainer)
        trainer.__class__ = type(own.__name__, (FitTrainer, own), {})
    if validation_interval(trainer) is None:
        trainer.val_check_interval = None  # type: ignore[assignment]  # EarlyStopping reads it


def _turn(callback: Callback) -> int:
    """Return the place of a callback: checks and saving come after what is checked and saved."""
    behind = (EpochChecks, MonitorChecks, ModuleHooks, SavesAfterStep, Checkpoint)
    return next((turn for turn, kind in enumerate(behind, 1) if isinstance(callback, kind)), 0)


class ResumeState(Callback):
    """Callback that saves the exact position of training, and restores it.

    Lightning writes its counters, but not which hooks have been called after a micro-batch, what
    metrics callbacks see, and which step was saved last. Here is what it needs besides; the counters
    are brought into the one form from which it goes on without a step, a validation or a checkpoint
    too few or too many. :func:`~lightning_kd.loops.prepare_trainer` adds it to a trainer.

    Args:
        earlier_rows: Of loggers that go on in a directory they have been in.
    """

    def __init__(self, earlier_rows: EarlierRows) -> None:
        self._restored: dict[str, Any] | None = None
        self._earlier_rows = earlier_rows
        self._clocks: dict[str, float | None] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin a run, which goes on from no checkpoint unless one is loaded after this."""
        self._restored = None

    # The moments.

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Note the moment after a micro-batch, if it is the last one of an optimizer step."""
        loop = _epoch_loop(trainer)
        loop.moment = TRAINED
        for callback in checkpoint_callbacks(trainer):
            if loop.in_step:
                callback._last_global_step_saved = trainer.global_step
                # Its clock runs out inside the step as well; it is asked again at the end.
                self._clocks.setdefault(callback.state_key, callback._last_time_checked)
                callback._last_time_checked = None
            elif callback.state_key in self._clocks:
                callback._last_time_checked = self._clocks.pop(callback.state_key)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the moment after a validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            _epoch_loop(trainer).moment = VALIDATED

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the moment after an epoch."""
        _epoch_loop(trainer).moment = ENDED

    # The checkpoint.

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what Lightning leaves out."""
        loop, loader = _epoch_loop(trainer), epoch_loader(trainer)
        now = loop.batch_progress.current
        checkpoint[CHECKPOINT_KEY] = {
            "moment": loop.moment or loop.pending,
            "epoch_complete": now.ready > 0 and loop._num_ready_batches_reached(),
            "samples_per_micro_batch": None if loader is None else loader.samples_per_micro_batch,
            "metrics": {
                name: value.detach().cpu().clone()
                for name, value in trainer.callback_metrics.items()
            },
            "measured": sorted(_measurements(trainer).names),
            "row": _row_to_come(trainer, loop),
            "early_stopping": stopping_settings(trainer),
            "saved": {
                callback.state_key: _saved(trainer, callback, loop.moment)
                for callback in checkpoint_callbacks(trainer)
            },
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Convert the counters into the form that training continues from.

        Raises:
            ValueError: If the checkpoint is from the inside of an optimizer step.
        """
        if trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        self._restored = checkpoint.get(CHECKPOINT_KEY)
        loops = checkpoint["loops"]["fit_loop"]
        place = place_of(trainer, self._restored, loops, checkpoint["global_step"])
        _epoch_loop(trainer).pending = place.pending
        loops.update(place.counters(loops))
        stopped_by = (self._restored or {}).get("early_stopping", {})
        under_new_settings(trainer, checkpoint.get("callbacks", {}), stopped_by)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore what callbacks saw and did before the checkpoint."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        trainer.callback_metrics.update(restored["metrics"])
        of_old = () if restored["moment"] == TRAINED else restored["metrics"]
        _measurements(trainer).restore(restored.get("measured", of_old))
        _epoch_loop(trainer).row_to_come = restored["row"]
        # The last step's row comes after the checkpoint only where it was saved right behind it.
        first = trainer.global_step - (restored["moment"] == TRAINED)
        self._earlier_rows.give_back(first)
        forget_steps(trainer, first)
        for callback in checkpoint_callbacks(trainer):
            saved = restored["saved"].get(callback.state_key)
            if saved is not None:
                _restore_saved(trainer, callback, saved)
        stopped = [
            callback
            for callback in early_stoppings(trainer)
            if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        ]
        if stopped:
            rank_zero_info(f"{type(stopped[0]).__name__} had asked this run to stop")
            trainer.should_stop = True


def _row_to_come(trainer: L.Trainer, loop: EpochLoop) -> dict[str, Any]:
    """Return what Lightning will log after the hooks in which it saves."""
    connector = trainer._logger_connector
    if loop.moment == ENDED or (loop.moment == TRAINED and connector.should_update_logs):
        return {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in connector.metrics["log"].items()
        }
    return {}


def _saved(trainer: L.Trainer, callback: ModelCheckpoint, moment: str) -> dict[str, Any]:
    """Return what a checkpoint callback will know of its last save, once this one is written."""
    path = trainer.saving if isinstance(trainer, FitTrainer) else ""
    names = {callback.last_model_path, callback.best_model_path, *callback.best_k_models}
    own = path in {os.path.realpath(name) for name in names if name}
    return {
        "step": trainer.global_step if own else callback._last_global_step_saved,
        "path": path if own else callback._last_checkpoint_saved,
        "deferred": callback._defer_save_until_validation and not (own and moment == VALIDATED),
        "dirpath": str(callback.dirpath),
        "score": callback.current_score,
        "files": sorted(_names(callback) | ({Path(path).name} if own else set())),
    }


def _restore_saved(trainer: L.Trainer, callback: ModelCheckpoint, saved: dict[str, Any]) -> None:
    callback._last_global_step_saved = saved["step"]
    callback._defer_save_until_validation = saved["deferred"]
    callback.current_score = saved["score"]
    if saved["dirpath"] != str(callback.dirpath):
        return
    callback._last_checkpoint_saved = saved["path"]
    lost = trainer.strategy.broadcast(_names(callback) - set(saved["files"]))
    callback.file_exists = _ExistsForRun(callback, lost)  # type: ignore[method-assign]


def _names(callback: ModelCheckpoint) -> set[str]:
    """Return the files in a callback's directory; none if it is not local."""
    folder = Path(str(callback.dirpath))
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


class _ExistsForRun:
    """Test of whether a checkpoint exists; one from after the point of a resume is written again.

    Otherwise it would get another name, with a version, and the old one would be left over.
    """

    def __init__(self, callback: ModelCheckpoint, lost: set[str]) -> None:
        self.callback, self.lost = callback, lost

    def __call__(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        if Path(filepath).name in self.lost:
            self.lost.discard(Path(filepath).name)
            return False
        return ModelCheckpoint.file_exists(self.callback, filepath, trainer)


def _measurements(trainer: L.Trainer) -> Measurements:
    found = measurements_of(trainer)
    assert found is not None  # prepare_trainer has seen to it
    return found


def _epoch_loop(trainer: L.Trainer) -> EpochLoop:
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, EpochLoop)  # prepare_trainer has seen to it
    return loop
