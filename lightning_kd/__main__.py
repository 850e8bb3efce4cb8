"""``lightning-kd`` and ``python -m lightning_kd``; what needs no torch is answered at once."""

import gc
import sys

from lightning_kd.cli.commands import COMMANDS, DESCRIPTION, unknown_command
from lightning_kd.cli.named_configs import config_files_or_exit
from lightning_kd.cli.stored_help import show_help
from lightning_kd.version import __version__


def main() -> None:
    """Say which commands there are, or run one."""
    given = sys.argv[1:]
    if not given:
        sys.stderr.write(f"lightning-kd: error: which command?\n\n{DESCRIPTION}")
        raise SystemExit(2)
    if given[0] in {"-h", "--help"}:
        sys.stdout.write(DESCRIPTION)
        return
    if given == ["--version"]:
        sys.stdout.write(f"lightning-kd {__version__}\n")
        return
    if not given[0].startswith("-") and given[0] not in COMMANDS:
        sys.stderr.write(f"lightning-kd: error: {unknown_command(given[0])}\n")
        raise SystemExit(2)
    config_files_or_exit(given)
    if not show_help(given, _run):
        _run()


def _run() -> None:
    # What is imported stays: to look for garbage among it takes a fifth of these seconds.
    gc.disable()
    try:
        from lightning_kd.cli.main import main as run
    finally:
        gc.enable()
    run()


if __name__ == "__main__":
    main()
