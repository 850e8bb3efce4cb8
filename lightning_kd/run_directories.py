"""One directory for each run."""

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def claim_version(trainer: L.Trainer) -> None:
    """Make the directory ``version_N`` of each logger that would number its own.

    Lightning's loggers look for the largest number that is there when they first log: two runs that
    are started together find the same one. Only one of them can make a directory.

    Args:
        trainer: Its loggers have not logged yet. Other ranks ask the first for the directory.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is None:
            logger._version = _claimed(logger)


def _claimed(logger: TensorBoardLogger | CSVLogger) -> int | None:
    """The number of a directory that this process has made; None on an object store."""
    root = os.path.expandvars(logger.root_dir)
    if "://" in root:
        return None
    number = logger._get_next_version()
    while not _made(Path(root).expanduser() / f"version_{number}"):
        number += 1
    return number


def _made(directory: Path) -> bool:
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True
