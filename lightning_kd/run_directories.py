"""One directory for each run."""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_kd.imports import KEPT

_OF_THE_START = re.compile(
    rf"config\.yaml|hparams\.yaml|{re.escape(KEPT)}|events\.out\.tfevents\..*"
)
"""Files that a run has before its first step."""


@rank_zero_only
def claim_version(trainer: L.Trainer) -> list[Path]:
    """Make the directory ``version_N`` of each logger that would number its own.

    Lightning's loggers look for the largest number that is there when they first log: two runs that
    are started together find the same one. Only one of them can make a directory.

    Args:
        trainer: Its loggers have not logged yet. Other ranks ask the first for the directory.

    Returns:
        The directories; none of them is on an object store.
    """
    made = []
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is None:
            root = os.path.expandvars(logger.root_dir)
            if "://" not in root:
                logger._version = _claimed(logger, Path(root).expanduser())
                made.append(Path(root).expanduser() / f"version_{logger._version}")
    return made


def give_back(directories: Iterable[Path]) -> None:
    """Remove directories of a run that was refused, where they hold what it was told and no more.

    Args:
        directories: Those of :func:`claim_version`.
    """
    for directory in directories:
        files = [path for path in directory.rglob("*") if not path.is_dir()]
        if all(_OF_THE_START.fullmatch(path.name) for path in files):
            shutil.rmtree(directory, ignore_errors=True)


def _claimed(logger: TensorBoardLogger | CSVLogger, root: Path) -> int:
    """The number of a directory that this process has made."""
    number = logger._get_next_version()
    while not _made(root / f"version_{number}"):
        number += 1
    return number


def _made(directory: Path) -> bool:
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True
