"""A checkpoint of a run that was broken off inside an optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L

from lightning_kd.loops.fit import EpochLoop, epoch_loader, processed


def has_trained(trainer: L.Trainer, steps_before: int) -> bool:
    """Return whether a run has taken an optimizer step since it began at ``steps_before``."""
    return isinstance(trainer.fit_loop.epoch_loop, EpochLoop) and (
        trainer.global_step > steps_before
    )


@contextmanager
def at_last_step(trainer: L.Trainer) -> Iterator[bool]:
    """Put a run's counters back to the end of its last optimizer step while the context is open.

    Weights and optimizer are still those of that step: what a broken-off step has changed are counts
    of micro-batches, which are trained on again by the run that goes on.

    Args:
        trainer: Of a run that was broken off.

    Yields:
        Whether it could be done: the loader must be one of this library's.
    """
    loop, loader = trainer.fit_loop.epoch_loop, epoch_loader(trainer)
    if not isinstance(loop, EpochLoop) or not loop.in_step:
        yield isinstance(loop, EpochLoop)
        return
    if loader is None:
        yield False
        return
    progress, moment = loop.batch_progress, loop.moment
    of_epoch, of_run, last = progress.current, progress.total, progress.is_last_batch
    done = processed(of_epoch)
    unfinished = done % trainer.accumulate_grad_batches
    given_back = of_epoch.ready - done + unfinished
    names = ("ready", "started", "processed", "completed")
    before = [{name: getattr(t, name) for name in names} for t in (of_epoch, of_run)]
    at_step = (done - unfinished, processed(of_run) - unfinished)
    position = loader.position
    try:
        for tracker, count in zip((of_epoch, of_run), at_step, strict=True):
            vars(tracker).update(dict.fromkeys(names, count))
        progress.is_last_batch, loop.moment = False, ""
        loader.position = position - given_back
        yield True
    finally:
        for tracker, values in zip((of_epoch, of_run), before, strict=True):
            vars(tracker).update(values)
        progress.is_last_batch, loop.moment = last, moment
        loader.position = position
