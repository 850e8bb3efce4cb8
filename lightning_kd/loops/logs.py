"""Logs of a run that goes on: every step once."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class EarlierRows:
    """Rows that ``CSVLogger`` would delete from a directory that it continues in.

    Args:
        trainer: Its loggers are asked before they open their files.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._rows: list[tuple[CSVLogger, list[dict[str, str]]]] = []
        # Processes do not know their ranks from the trainer yet.
        for logger in trainer.loggers if getattr(rank_zero_only, "rank", 0) == 0 else ():
            if isinstance(logger, CSVLogger) and logger._experiment is None:
                path = Path(logger.log_dir) / "metrics.csv"
                if path.is_file():
                    with path.open(newline="") as file:
                        self._rows.append((logger, list(csv.DictReader(file))))
            if isinstance(logger, TensorBoardLogger) and logger._experiment is None:
                # Hyperparameters bring a row of a metric that stands for none; it is there already.
                begun = any(Path(logger.log_dir).glob("events.out.tfevents.*"))
                logger._default_hp_metric = logger._default_hp_metric and not begun

    def give_back(self, before: int) -> None:
        """Write the rows of steps before ``before`` again."""
        for logger, rows in self._rows:
            experiment = logger.experiment
            # A process that is killed may leave half a line.
            kept = [row for row in rows if str(row["step"]).isdigit() and int(row["step"]) < before]
            if kept and not Path(experiment.metrics_file_path).exists():
                experiment.metrics_keys = sorted(kept[0])
                with Path(experiment.metrics_file_path).open("w", newline="") as file:
                    writer = csv.DictWriter(file, fieldnames=experiment.metrics_keys)
                    writer.writeheader()
                    writer.writerows(kept)
        self._rows = []


def forget_steps(trainer: L.Trainer, first: int) -> None:
    """Make TensorBoard drop what was logged in the same directory from step ``first`` on."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            writer: Any = logger.experiment._get_file_writer()
            restart = SessionLog(status=SessionLog.START)
            writer.add_event(Event(step=first, session_log=restart), first)
