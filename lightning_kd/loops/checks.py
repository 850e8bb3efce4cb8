"""Which of Lightning's options go together with epochs that end with a step."""

import logging
import math

import lightning as L
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

from lightning_kd.loops.after_validation import ranks_by_validation
from lightning_kd.loops.fit import (
    EpochLoader,
    batches_between_validations,
    checkpoint_callbacks,
    early_stoppings,
    limited,
    validation_interval,
)

log = logging.getLogger(__name__)

_EPOCHS_LOOKED_AT = 1000
"""Epochs have two lengths; more than this many are not looked through for the second."""


def check_limits(trainer: L.Trainer) -> None:
    """Refuse limits of a run, and intervals in it, that cannot be kept.

    Raises:
        ValueError: If there is one.
    """
    for callback, instead in (
        (GradientAccumulationScheduler, "set trainer.accumulate_grad_batches, for the run"),
        (StochasticWeightAveraging, "use WeightAveraging or EMAWeightAveraging of Lightning"),
    ):
        if any(isinstance(c, callback) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(f"{callback.__name__} {_REASONS[callback]}; {instead}")
    micro_batches, interval = trainer.accumulate_grad_batches, validation_interval(trainer)
    if micro_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {micro_batches}; it must be 1 or more"
        )
    for what in ("steps", "epochs"):
        least, most = getattr(trainer, f"min_{what}"), getattr(trainer, f"max_{what}")
        if least is not None and most not in {None, -1} and least > most:
            raise ValueError(f"trainer.min_{what} is {least}, above trainer.max_{what}, {most}")
    if (epochs := trainer.check_val_every_n_epoch) is not None and epochs < 1:
        raise ValueError(
            f"trainer.check_val_every_n_epoch is {epochs}; it must be 1 or more, or null"
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not (math.isfinite(clip) and clip >= 0):
        raise ValueError(f"trainer.gradient_clip_val is {clip}; it must be 0 (none) or more")
    if isinstance(interval, int) and interval % micro_batches and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"trainer.val_check_interval is {interval} micro-batches, which accumulate_grad_batches "
            f"{micro_batches} does not divide: validation would fall inside an optimizer step, where "
            f"nothing can be saved. Use {_multiples(interval, micro_batches)}"
        )
    callbacks = [type(c).__name__ for c in checkpoint_callbacks(trainer) if c.save_on_exception]
    callbacks += [
        type(c).__name__
        for c in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(c, OnExceptionCheckpoint)
    ]
    if callbacks:
        raise ValueError(
            f"{callbacks[0]} is to save on an exception, which comes inside an optimizer step: no run "
            "could go on from there. Use ModelCheckpoint with every_n_train_steps and save_last, and "
            "SaveOnTermination for signals"
        )


class EpochChecks(Callback):
    """Check a run's epochs before its models are loaded, when callbacks have planned its windows."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the epochs of the training loader."""
        data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and data is not None:
            loader = data.train_dataloader()
            if isinstance(loader, EpochLoader):
                check_epochs(trainer, loader)


def check_epochs(trainer: L.Trainer, loader: EpochLoader) -> None:
    """Refuse options that epochs of this library's loaders do not support.

    Raises:
        ValueError: If the trainer is asked for it.
    """
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ValueError(
            f"trainer.overfit_batches is {trainer.overfit_batches}: it wants the same batches in "  # type: ignore[attr-defined]
            "every epoch, and each epoch has an order of its own. Give data.train only the rows to "
            "overfit, as data.validation too, and trainer.max_epochs"
        )
    ends = (EarlyStopping, Timer)
    if trainer.max_steps == trainer.max_epochs == -1 and not any(
        isinstance(c, ends)
        for c in trainer.callbacks  # type: ignore[attr-defined]
    ):
        raise ValueError(
            "the run has no end: give trainer.max_steps or trainer.max_epochs (one pass is "
            f"{loader.length_of(0) // trainer.accumulate_grad_batches} optimizer steps), max_time, or "
            "EarlyStopping"
        )
    _check_lengths(trainer, loader)
    monitors = [(type(c).__name__, c.monitor) for c in early_stoppings(trainer)]
    monitors += [(type(c).__name__, c.monitor or "") for c in checkpoint_callbacks(trainer)]
    for name, monitor in monitors:
        if monitor.startswith("val/"):
            check_validates(trainer, loader, name, monitor)
    if trainer.enable_validation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for saving in checkpoint_callbacks(trainer):
            if ranks_by_validation(saving):
                _check_ranking(trainer, loader, saving)
        for stopping in early_stoppings(trainer):
            if stopping.monitor.startswith("val/") and stopping._check_on_train_epoch_end:
                _check_epochs_are_validated(
                    trainer,
                    f"EarlyStopping compares {stopping.monitor}",
                    "check_on_train_epoch_end",
                )


def check_validates(trainer: L.Trainer, loader: EpochLoader, what: str, monitor: str) -> None:
    """Refuse an option that depends on validation if the run ends before the first one.

    Args:
        trainer: It validates, if it comes so far.
        loader: Tells its epochs.
        what: Depends on the metric.
        monitor: The metric.

    Raises:
        ValueError: If no validation comes.
    """
    if not trainer.enable_validation or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    first, run = _first_validation(trainer, loader), _micro_batches(trainer, loader)
    epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
    too_few_epochs = epochs not in {None, -1} and every is not None and every > (epochs or 0)
    if too_few_epochs or 0 < run < first:
        by_steps = run == trainer.max_steps * trainer.accumulate_grad_batches
        steps = by_steps and not too_few_epochs
        ends = f"max_steps {trainer.max_steps}" if steps else f"max_epochs {epochs}"
        raise ValueError(
            f"{what} depends on {monitor}, and the run ends, by trainer.{ends}, before its first "
            f"validation, after {first} micro-batches. Lower trainer.val_check_interval or "
            "trainer.check_val_every_n_epoch, or let the run be longer"
        )


def _micro_batches(trainer: L.Trainer, loader: EpochLoader) -> float:
    """Count the micro-batches of the run, as its steps and epochs end it; infinite if they do not."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    most = math.inf if steps == -1 else steps * trainer.accumulate_grad_batches
    if epochs in {None, -1}:
        return most
    behind = 0
    for epoch in range(epochs or 0):
        behind += limited(loader.length_of(epoch), trainer.limit_train_batches)
        if behind >= most or epoch == _EPOCHS_LOOKED_AT:
            return most
    return behind


def _first_validation(trainer: L.Trainer, loader: EpochLoader) -> int:
    """Return the micro-batches up to the first validation; 0 if it comes by time."""
    interval, limit = validation_interval(trainer), trainer.limit_train_batches
    if interval is None:
        return 0
    before = min(trainer.check_val_every_n_epoch or 1, _EPOCHS_LOOKED_AT) - 1
    lengths = [limited(loader.length_of(e), limit) for e in range(before + 1)]
    if isinstance(interval, float):
        interval = batches_between_validations(interval, lengths[-1], trainer)
    return sum(lengths[:-1]) + interval


_REASONS = {
    GradientAccumulationScheduler: (
        "changes the rows of an optimizer step from epoch to epoch, and no run could go on exactly"
    ),
    StochasticWeightAveraging: (
        "copies the module before its student is there, and would average nothing"
    ),
}


def _check_lengths(trainer: L.Trainer, loader: EpochLoader) -> None:
    epochs = trainer.max_epochs if trainer.max_epochs not in {None, -1} else _EPOCHS_LOOKED_AT
    lengths = {loader.length_of(e) for e in range(min(epochs or 1, _EPOCHS_LOOKED_AT))}
    limit, window = trainer.limit_train_batches, loader.window_length
    cut = [limited(length, limit) for length in lengths]
    if limit and any(length % window for length in cut):
        name = "fast_dev_run" if trainer.fast_dev_run else "limit_train_batches"  # type: ignore[attr-defined]
        raise ValueError(
            f"trainer.{name} is {limit}: it would end an epoch after {min(cut)} micro-batches, inside "
            f"an optimizer step or window of rollouts, which have {window}. Use "
            f"{_multiples(min(cut), window)}"
        )
    interval = validation_interval(trainer)
    if not isinstance(interval, int) or not trainer.enable_validation or not limit:
        return
    by_epoch = trainer.check_val_every_n_epoch is not None
    if by_epoch and interval > min(cut):
        raise ValueError(
            f"trainer.val_check_interval is {interval} micro-batches of an epoch, and epochs have "
            f"{min(cut)}. For every {interval} micro-batches of the run, set "
            "trainer.check_val_every_n_epoch: null"
        )
    run = _micro_batches(trainer, loader)
    if not by_epoch and interval > run > 0 and trainer.is_global_zero:
        log.warning(
            f"trainer.val_check_interval is {interval} micro-batches, and the run has {run}: nothing "
            f"is validated. For a validation at its end set trainer.val_check_interval: {run}"
        )


def _check_ranking(trainer: L.Trainer, loader: EpochLoader, saving: ModelCheckpoint) -> None:
    """Refuse to rank weights by a metric of validation that was measured on other ones."""
    does = f"ModelCheckpoint ranks by {saving.monitor}"
    beside = "For checkpoints between validations add a ModelCheckpoint without a monitor"
    every, epochs = saving._every_n_train_steps, saving.every_n_epochs or 0
    if saving._save_on_train_epoch_end:
        _check_epochs_are_validated(trainer, does, "save_on_train_epoch_end")
    if every and (step := _save_without_validation(trainer, loader, every)) is not None:
        interval, cut_into = validation_interval(trainer), trainer.accumulate_grad_batches
        multiple = ""
        if isinstance(interval, int) and trainer.check_val_every_n_epoch is None:
            multiple = f", or make it a multiple of {interval // cut_into}, the steps between them"
        raise ValueError(
            f"{does} and has every_n_train_steps {every}, but step {step} is not validated: its "
            "weights would be ranked by a measurement of others. Drop every_n_train_steps, so that it "
            f"saves after each validation{multiple}. {beside}"
        )
    validated = trainer.check_val_every_n_epoch or 1
    if epochs > 1 and epochs % validated:
        raise ValueError(
            f"{does} and has every_n_epochs {epochs}, but epochs are validated by "
            f"trainer.check_val_every_n_epoch {validated}: use a multiple of it. {beside}"
        )


def _check_epochs_are_validated(trainer: L.Trainer, does: str, option: str) -> None:
    """Refuse decisions at the ends of epochs if validations come at other steps."""
    if validation_interval(trainer) != 1.0 or trainer.check_val_every_n_epoch != 1:
        raise ValueError(
            f"{does} and has {option}, but not every epoch ends with a validation "
            f"(trainer.val_check_interval, trainer.check_val_every_n_epoch): the weights there would "
            f"be judged by a measurement of others. Drop {option}: it decides after each validation"
        )


def _save_without_validation(trainer: L.Trainer, loader: EpochLoader, every: int) -> int | None:
    """Return the first save, every so many steps, that no validation follows; None if each has one.

    Where validation goes by time that is the first one.
    """
    interval, by_epoch = validation_interval(trainer), trainer.check_val_every_n_epoch
    if interval is None:
        return every
    cut_into, begun = trainer.accumulate_grad_batches, 0
    between, run = every * cut_into, _micro_batches(trainer, loader)
    epochs = _EPOCHS_LOOKED_AT if trainer.max_epochs in {None, -1} else trainer.max_epochs or 0
    for epoch in range(min(epochs, _EPOCHS_LOOKED_AT)):
        length = limited(loader.length_of(epoch), trainer.limit_train_batches)
        apart = interval
        if isinstance(apart, float):
            apart = batches_between_validations(apart, length, trainer)
        first = between - begun % between
        # If the first two of an epoch are validated, all of them are.
        for at in (first, first + between):
            if at > min(length, run - begun):
                break
            place = at if by_epoch else begun + at
            if place % apart or (epoch + 1) % (by_epoch or 1):
                return (begun + at) // cut_into
        begun += length
    return None


def _multiples(value: int, unit: int) -> str:
    """Return the multiples around a value, in words.

    Example:
        >>> _multiples(5, 2), _multiples(1, 4)
        ('4 or 6', '4')
    """
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
