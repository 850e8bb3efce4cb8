"""The commands of the trainer, with what every run has."""

from typing import TypeVar

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_kd.callbacks import (
    SaveOnTermination,
    TensorBoardLayout,
    TimeoutReport,
    TokensPerSecond,
)
from lightning_kd.cli.check import CommandTrainer
from lightning_kd.cli.commands import DESCRIPTION
from lightning_kd.cli.distillation_cli import RUNS, DistillationCLI
from lightning_kd.cli.messages import HelpFormatter, ShortErrorParser
from lightning_kd.cli.run_config import RunConfig
from lightning_kd.version import __version__

_CLI = TypeVar("_CLI", bound=DistillationCLI)


def trainer_command(kind: type[_CLI]) -> _CLI:
    """Make a command line, which runs what ``sys.argv`` says; return it when that has ended.

    Args:
        kind: Its class.
    """
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=CommandTrainer,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=ShortErrorParser,
        parser_kwargs={
            "prog": "lightning-kd",
            "description": DESCRIPTION,
            "formatter_class": HelpFormatter,
            "version": __version__,
        },
        trainer_defaults={
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": RUNS, "name": "", "default_hp_metric": False},
            },
            "callbacks": [
                TensorBoardLayout(),
                TokensPerSecond(),
                TimeoutReport(),
                SaveOnTermination(),
            ],
        },
    )
