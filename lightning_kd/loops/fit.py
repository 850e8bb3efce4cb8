"""Lightning's fit loop, for epochs whose lengths differ and for runs that go on in the middle."""

import math
import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _ProcessedTracker, _ReadyCompletedTracker
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_kd.loops.measurements import is_measured

TRAINED, VALIDATED, ENDED = "trained", "validated", "ended"
"""Moments at which callbacks save: after a micro-batch, a validation, an epoch."""


@runtime_checkable
class EpochLoader(Protocol):
    """A loader that knows where each epoch of a run begins."""

    position: int
    """Micro-batches of the run, on each rank, up to the last that was handed out."""
    samples_per_micro_batch: int
    """Over all ranks."""
    window_length: int
    """Micro-batches that belong together: an epoch has a multiple of them."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless the position is in it already."""
        ...

    def start_of(self, epoch: int) -> int:
        """The position at which an epoch begins."""
        ...

    def epoch_of(self, position: int) -> int:
        """The epoch of the micro-batch that follows a position."""
        ...

    def length_of(self, epoch: int) -> int:
        """Micro-batches of an epoch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        ...


class EpochLoop(_TrainingEpochLoop):
    """The loop over an epoch's micro-batches; it stops, validates and saves only between steps."""

    moment = ""
    """Which of the moments training is at."""
    pending = ""
    """The moment at which the checkpoint was saved that this run goes on from, until it has."""
    row_to_come: Mapping[str, Any] = MappingProxyType({})
    """Metrics that were to be logged after that moment."""

    @property
    def in_step(self) -> bool:
        """Whether a checkpoint would lose a gradient, or a micro-batch that is being trained on."""
        now = self.batch_progress.current
        return now.ready != processed(now) or self._should_accumulate()

    @property
    def done(self) -> bool:
        """Whether the epoch is over; a request to stop waits for the optimizer step."""
        return super().done and not self._should_accumulate()

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        if self._should_accumulate():
            return False
        decision = super()._should_check_val_fx(data_fetcher)
        if self.trainer._val_check_time_interval is None:
            return decision
        # Each process has a clock of its own, and all must validate together.
        return bool(self.trainer.strategy.broadcast(decision))

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Step schedules; one that depends on validation, only behind one that has measured it."""
        strategy = self.trainer.strategy
        configs = strategy.lr_scheduler_configs
        strategy.lr_scheduler_configs = [
            c for c in configs if not c.reduce_on_plateau or is_measured(self.trainer, c.monitor)
        ]
        try:
            super()._update_learning_rates(interval, update_plateau_schedulers)
        finally:
            strategy.lr_scheduler_configs = configs

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Begin an epoch; in a resumed run, do first what was due when it was saved."""
        super().on_run_start(data_fetcher)
        if not self.restarting:
            return
        # Lightning has stages of its own for going on, which skip validations or repeat them.
        self._restarting = self.trainer.fit_loop._restarting = False
        self.val_loop.restarting = False
        moment, self.pending = self.pending, ""
        if moment:
            self.do_what_was_due(moment)
            self._skip_next_val = moment == VALIDATED
            self.on_advance_end(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is time."""
        super().on_advance_end(data_fetcher)
        self.moment = ""

    def do_what_was_due(self, moment: str) -> None:
        """Call the checkpoint callbacks that were still to be called when another one saved; log."""
        self.moment = moment
        trainer = self.trainer
        for callback in checkpoint_callbacks(trainer):
            if moment == TRAINED:
                callback.on_train_batch_end(
                    trainer, trainer.lightning_module, None, None, self.batch_idx
                )
            elif moment == VALIDATED:
                callback.on_validation_end(trainer, trainer.lightning_module)
            else:
                callback.on_train_epoch_end(trainer, trainer.lightning_module)
        # Lightning logs what belongs to an epoch under its last step.
        self._batches_that_stepped -= moment == ENDED
        trainer._logger_connector.log_metrics(dict(self.row_to_come))
        self._batches_that_stepped += moment == ENDED


class FitLoop(_FitLoop):
    """The loop over epochs, each as long as its loader says."""

    epoch_loop: EpochLoop
    _without_batches = 0

    @property
    def done(self) -> bool:
        """Whether the run is over, with nothing left that was due when it was saved."""
        return not self.epoch_loop.pending and super().done

    def setup_data(self) -> None:
        """Set up the loader, and what follows from the length of this epoch."""
        with warnings.catch_warnings():
            # Logs go on from epoch to epoch: a short epoch leaves none of them out.
            warnings.filterwarnings(
                "ignore", message="The number of training batches .* is smaller"
            )
            super().setup_data()
        if self._data_fetcher is None:
            return
        if self.restarting and self._combined_loader_states_to_load:
            # Set up before there was a state: configure_optimizers had asked for the steps of the run.
            self._load_combined_loader_states()
            iter(self._data_fetcher)
        trainer, loader = self.trainer, epoch_loader(self.trainer)
        if loader is not None:
            epoch = processed(self.epoch_progress.current)
            if self.epoch_loop.batch_progress.total.ready == 0:
                loader.position = 0  # of an earlier trial of a search, whose progress is forgotten
            loader.set_epoch(epoch)
            self.max_batches = limited(loader.length_of(epoch), trainer.limit_train_batches)
            self._data_fetcher.combined_loader.limits = [self.max_batches]
            self._data_fetcher.length = self.max_batches
        interval, length = validation_interval(trainer), self.max_batches
        if isinstance(interval, float) and isinstance(length, int):
            trainer.val_check_batch = batches_between_validations(interval, length, trainer)

    def on_run_start(self) -> None:
        """Begin; a run that was saved at the end of an epoch ends that epoch first."""
        super().on_run_start()
        if self.epoch_loop.pending == ENDED:
            self.epoch_loop.pending = ""
            # The epoch's number, in names of files and in intervals, is still that of the old one.
            self.epoch_progress.current.completed -= 1
            self.epoch_loop.do_what_was_due(ENDED)
            self.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            self.epoch_progress.current.completed += 1
            self.epoch_loop.moment = ""

    def on_advance_start(self) -> None:
        """Begin an epoch, and tell the progress bar its length, in the middle of one too."""
        super().on_advance_start()
        bar = self.trainer.progress_bar_callback
        if self.restarted_mid_epoch and bar is not None:
            bar.on_train_epoch_start(self.trainer, self.trainer.lightning_module)

    def on_advance_end(self) -> None:
        """End an epoch.

        Raises:
            ValueError: If the loader has given no batch two times in a row.
        """
        empty = self.epoch_loop.batch_progress.current.ready == 0
        self._without_batches = self._without_batches + 1 if empty else 0
        if self._without_batches > 1:
            raise ValueError(
                f"the training loader has given no batch in epoch {self.trainer.current_epoch}, though "
                f"its length is {self.max_batches}: training would not end. Check whether the loader "
                "can be iterated over more than once"
            )
        super().on_advance_end()
        self.epoch_loop.moment = ""


class FitTrainer(L.Trainer):
    """A trainer that saves no checkpoint inside an optimizer step."""

    saving = ""
    """The path of the checkpoint that is being saved."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the run, over the real lengths of its epochs."""
        known = estimated_steps(self)
        return super().estimated_stepping_batches if known is None else known

    def save_checkpoint(
        self, filepath: _PATH, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Raises:
            ValueError: If a run could not go on from it: it is inside an optimizer step.
        """
        loop = self.fit_loop.epoch_loop
        if not weights_only and isinstance(loop, EpochLoop) and loop.in_step:
            done, of = processed(loop.batch_progress.current), self.accumulate_grad_batches
            raise ValueError(
                f"the checkpoint {filepath} would be inside an optimizer step (after {done % of} of "
                f"its {of} micro-batches), and the gradient so far would be lost. Save at the end of "
                "a step (in on_train_batch_end, when trainer.global_step has grown), or give "
                "weights_only=True"
            )
        for logger in self.loggers:
            logger.save()  # a run that goes on from here does not log again what came before
        self.saving = os.path.realpath(filepath)
        try:
            super().save_checkpoint(filepath, weights_only, storage_options)
        finally:
            self.saving = ""


def processed(tracker: _ReadyCompletedTracker) -> int:
    """Return how many have been processed; their hooks may not have been called."""
    assert isinstance(tracker, _ProcessedTracker)  # of batches and epochs
    return tracker.processed


def epoch_loader(trainer: L.Trainer) -> EpochLoader | None:
    """Return the training loader, if it knows its epochs."""
    loader = trainer.train_dataloader
    return loader if isinstance(loader, EpochLoader) else None


def checkpoint_callbacks(trainer: L.Trainer) -> list[ModelCheckpoint]:
    """Return Lightning's checkpoint callbacks of a trainer."""
    found: list[Checkpoint] = trainer.checkpoint_callbacks
    return [callback for callback in found if isinstance(callback, ModelCheckpoint)]


def early_stoppings(trainer: L.Trainer) -> list[EarlyStopping]:
    """Return the ``EarlyStopping`` callbacks of a trainer."""
    return [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]


def validation_interval(trainer: L.Trainer) -> int | float | None:
    """Return ``val_check_interval``, in micro-batches or a share of an epoch; None if it is a time."""
    return getattr(trainer, "val_check_interval", None)


def batches_between_validations(share: float, length: int, trainer: L.Trainer) -> int:
    """Return a share of an epoch's micro-batches, rounded down to complete optimizer steps."""
    steps = int(length * share) // trainer.accumulate_grad_batches
    return length if share == 1.0 else max(1, steps) * trainer.accumulate_grad_batches


def limited(length: int, limit: int | float) -> int:
    """Return how many of an epoch's micro-batches ``limit_train_batches`` leaves."""
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def estimated_steps(trainer: L.Trainer) -> int | float | None:
    """Count the optimizer steps of a run; infinite if nothing ends it, None with another loader."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    loader, epochs = epoch_loader(trainer), trainer.max_epochs
    if loader is None or epochs is None:
        return None
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if epochs == -1:
        return limit
    lengths = (limited(loader.length_of(e), trainer.limit_train_batches) for e in range(epochs))
    return min(sum(lengths) // trainer.accumulate_grad_batches, limit)
