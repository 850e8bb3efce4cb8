"""What the first rank alone does, and all ranks hear of."""

from collections.abc import Callable

import lightning as L


def on_first_rank(trainer: L.Trainer, check: Callable[[], None]) -> None:
    """Call a function on the first rank; all ranks raise its ``ValueError``.

    Raises:
        ValueError: If the function raises one.
    """
    message: str | None = None
    if trainer.is_global_zero:
        try:
            check()
        except ValueError as error:
            message = str(error)
    message = trainer.strategy.broadcast(message)
    if message is not None:
        raise ValueError(message)
