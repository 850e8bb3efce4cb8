"""What comes before any command of ``lightning-kd``."""

import sys
from collections.abc import Sequence

from jsonargparse import set_loader, set_parsing_settings
from yaml import YAMLError

from lightning_kd.cli.models import read_file
from lightning_kd.cli.output import leave_out_noise
from lightning_kd.imports import OwnModules
from lightning_kd.modules import MiniLLMObjective
from lightning_kd.processes import end_together


def prepare(arguments: Sequence[str]) -> None:
    """Make this process one of a command: its signals, what it may import, and how it reads.

    Args:
        arguments: Its command line; a user's own classes may lie beside the files in it.
    """
    end_together()
    find_own_modules(arguments)
    leave_out_noise()
    # A data class is otherwise only taken for itself, never for a preset that derives from it.
    set_parsing_settings(subclasses_enabled=[MiniLLMObjective])
    set_loader("yaml", read_file, (YAMLError,))


def find_own_modules(arguments: Sequence[str]) -> None:
    """Begin to find the modules that a command line and its configs name.

    Args:
        arguments: The command line.
    """
    for hidden in filter(None, OwnModules.of_arguments(arguments).install()):
        sys.stderr.write(f"lightning-kd: {hidden}\n")
