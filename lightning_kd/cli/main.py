"""Runs a command of ``lightning-kd``."""

import sys
from typing import Any

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_kd.cli.arguments import with_student_data
from lightning_kd.cli.compare import compare
from lightning_kd.cli.demo import demo
from lightning_kd.cli.distillation_cli import DistillationCLI
from lightning_kd.cli.messages import ShortErrors, shorten
from lightning_kd.cli.named_configs import config_files_or_exit, with_config_files
from lightning_kd.cli.preparation import prepare
from lightning_kd.cli.trainer_command import trainer_command
from lightning_kd.data import write_tokenizer
from lightning_kd.serving import serve
from lightning_kd.student_evaluation import evaluate

EXTRA_COMMANDS: dict[str, Any] = {
    "compare": compare,
    "demo": demo,
    "evaluate": evaluate,
    "tokenizer": write_tokenizer,
    "serve": serve,
}


def main() -> None:
    """Entry point of ``lightning-kd`` and ``python -m lightning_kd``."""
    prepare(config_files_or_exit(sys.argv[1:]))
    if len(sys.argv) > 1 and sys.argv[1] in EXTRA_COMMANDS:
        try:
            _run_extra(sys.argv[1], sys.argv[2:])
        except (ValueError, ImportError, MisconfigurationException) as error:
            said = f"{error}"
            if "Does not validate" in said:  # jsonargparse's, around what a constructor says
                said = shorten(said)
            sys.stderr.write(f"lightning-kd {sys.argv[1]}: error: {said}\n")
            raise SystemExit(2) from error
        return
    trainer_command(DistillationCLI)


def _run_extra(name: str, words: list[str]) -> None:
    if name == "compare":
        compare(words)
        return
    auto_cli(
        EXTRA_COMMANDS[name],
        args=with_student_data(with_config_files([name, *words]))[1:],
        as_positional=False,
        parser_class=ShortErrors,
        prog=f"lightning-kd {name}",
    )
