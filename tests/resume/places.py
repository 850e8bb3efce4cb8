"""Places in a run where its process dies, as by ``kill -9``."""

import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

HOOKS = {
    "state restored": "on_train_start",
    "micro-batch begins": "on_train_batch_start",
    "gradients of a step complete": "on_before_optimizer_step",
    "micro-batch ended": "on_train_batch_end",
    "validation begins": "on_validation_start",
    "amid validation": "on_validation_batch_end",
    "validation ended, not saved": "on_validation_end",
    "epoch ended": "on_train_epoch_end",
    "training ended": "on_train_end",
}
"""Places that a callback sees, which stands before those that save."""

FILES = ("checkpoint half written", "checkpoint not yet in place", "checkpoint just in place")
"""Places in the writing of a file, which one process does for all."""

MOMENT = "a moment after a micro-batch"
LOGGED = "row logged"
PLACES = (*HOOKS, *FILES, LOGGED, MOMENT)
OF_THE_FIRST = (*FILES, LOGGED)
"""Places that only the first process comes to."""

COMES = {"state restored": 1, "validation begins": 3, "validation ended, not saved": 3}
COMES |= {"epoch ended": 2, "training ended": 1, "amid validation": 4, LOGGED: 6}
COMES |= dict.fromkeys(FILES, 6)
"""How often a run comes to a place, about; 10 times where nothing is said."""


def die_at(place: str, count: int, seconds: float, callback: type[Callback]) -> None:
    """Let this process die when it comes to a place for the ``count``-th time.

    Args:
        place: One of ``PLACES``.
        count: The first time is 1.
        seconds: How long after, for ``MOMENT``.
        callback: A class of which the run has an instance, before those that save.
    """
    arrive = _Countdown(count)
    if place in HOOKS:
        name = HOOKS[place]
        setattr(callback, name, _hooked(getattr(callback, name), arrive))
    elif place == MOMENT:
        callback.on_train_batch_end = _later(callback.on_train_batch_end, arrive, seconds)  # type: ignore[method-assign]
    elif place == LOGGED:
        TensorBoardLogger.log_metrics = _afterwards(TensorBoardLogger.log_metrics, arrive)  # type: ignore[method-assign]
    else:
        Path.replace = _written(Path.replace, arrive, place)  # type: ignore[method-assign]


def die() -> None:
    """Nothing of this process runs after this."""
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """True at the last of so many calls."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def _hooked(hook: Callable[..., None], arrive: _Countdown) -> Callable[..., None]:
    @functools.wraps(hook)
    def dying(self: Callback, trainer: Any, *rest: Any, **named: Any) -> None:
        hook(self, trainer, *rest, **named)
        if not trainer.sanity_checking and arrive():
            die()

    return dying


def _later(hook: Callable[..., None], arrive: _Countdown, seconds: float) -> Callable[..., None]:
    @functools.wraps(hook)
    def dying(*given: Any, **named: Any) -> None:
        hook(*given, **named)
        if arrive():
            threading.Timer(seconds, die).start()

    return dying


def _afterwards(call: Callable[..., Any], arrive: _Countdown) -> Callable[..., Any]:
    @functools.wraps(call)
    def dying(*given: Any, **named: Any) -> Any:
        done = call(*given, **named)
        if arrive():
            die()
        return done

    return dying


def _written(replace: Callable[..., Any], arrive: _Countdown, place: str) -> Callable[..., Any]:
    @functools.wraps(replace)
    def dying(self: Path, target: Any) -> Any:
        now = self.name.endswith(".ckpt.fresh") and arrive()
        if now and place == "checkpoint half written":
            os.truncate(self, self.stat().st_size // 2)
        if now and place != "checkpoint just in place":
            die()
        done = replace(self, target)
        if now:
            die()
        return done

    return dying
