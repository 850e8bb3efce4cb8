"""Numbers in the progress bar."""

import lightning as L


def show(trainer: L.Trainer, name: str, value: float) -> None:
    """Let progress bars show a number that the host has.

    What is logged with ``prog_bar`` is read by Lightning at the end of every batch, and the host waits
    until an accelerator has done all its work.

    Args:
        trainer: The trainer, in training.
        name: Stands before the number.
        value: The number, the same on all ranks.
    """
    trainer.progress_bar_metrics[name] = value
