"""Runs a command of ``lightning-kd``."""

import sys
from importlib.metadata import version
from typing import Any

from jsonargparse import auto_cli, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from yaml import YAMLError

from lightning_kd.callbacks import (
    SaveOnTermination,
    TensorBoardLayout,
    TimeoutReport,
    TokensPerSecond,
)
from lightning_kd.cli.arguments import with_student_data
from lightning_kd.cli.check import CommandTrainer
from lightning_kd.cli.commands import DESCRIPTION
from lightning_kd.cli.distillation_cli import RUNS, DistillationCLI
from lightning_kd.cli.messages import HelpFormatter, ShortErrorParser, ShortErrors
from lightning_kd.cli.models import read_file
from lightning_kd.cli.output import leave_out_noise
from lightning_kd.data import write_tokenizer
from lightning_kd.demo import demo
from lightning_kd.imports import OwnModules
from lightning_kd.modules import MiniLLMObjective
from lightning_kd.processes import end_together
from lightning_kd.serving import serve
from lightning_kd.student_evaluation import evaluate

EXTRA_COMMANDS: dict[str, Any] = {
    "demo": demo,
    "evaluate": evaluate,
    "tokenizer": write_tokenizer,
    "serve": serve,
}


def main() -> None:
    """Entry point of ``lightning-kd`` and ``python -m lightning_kd``."""
    end_together()
    for hidden in filter(None, OwnModules.of_arguments(sys.argv[1:]).install()):
        sys.stderr.write(f"lightning-kd: {hidden}\n")
    leave_out_noise()
    # A data class is otherwise only taken for itself, never for a preset that derives from it.
    set_parsing_settings(subclasses_enabled=[MiniLLMObjective])
    set_loader("yaml", read_file, (YAMLError,))
    if len(sys.argv) > 1 and sys.argv[1] in EXTRA_COMMANDS:
        command = EXTRA_COMMANDS[sys.argv[1]]
        try:
            auto_cli(
                command,
                args=with_student_data(sys.argv[1:])[1:],
                as_positional=False,
                parser_class=ShortErrors,
                prog=f"lightning-kd {sys.argv[1]}",
            )
        except (ValueError, ImportError, MisconfigurationException) as error:
            sys.stderr.write(f"lightning-kd {sys.argv[1]}: error: {error}\n")
            raise SystemExit(2) from error
        return
    DistillationCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=CommandTrainer,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=ShortErrorParser,
        parser_kwargs={
            "prog": "lightning-kd",
            "description": DESCRIPTION,
            "formatter_class": HelpFormatter,
            "version": version("lightning-kd"),
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
