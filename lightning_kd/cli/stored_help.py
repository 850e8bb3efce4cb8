"""Help that has been shown once is shown at once the next time: building it takes ten seconds.

Most of those are the imports of torch, Lightning and transformers, whose options it lists.
"""

import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import distributions
from pathlib import Path

from lightning_kd.filesystem import write_text

_ASKS_FOR_HELP = r"\w+ (-h|--help|--[\w.]+\.help[= ]\w+)"
"""Help of a command, or of a class by its name; with other words, it may depend on their files."""

_PACKAGE = Path(__file__).resolve().parents[1]


def show_help(words: list[str], build: Callable[[], None]) -> bool:
    """Show the help that a command line asks for; return whether it asks for nothing else.

    The text is kept in ``~/.cache/lightning_kd`` (``$XDG_CACHE_HOME/lightning_kd`` where that is set)
    under what it depends on: the words, the terminal, every installed package's version, and the
    files of this one. Where it cannot be kept, it is built each time.

    Args:
        words: The command line, without the program's name.
        build: Prints the help, where none is stored, and may raise ``SystemExit``.
    """
    if not re.fullmatch(_ASKS_FOR_HELP, " ".join(words)):
        return False
    place = _directory() / "_".join(re.findall(r"\w+", " ".join(words)))
    stored = place / f"{_fingerprint(words)}.txt"
    try:
        sys.stdout.write(stored.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        _keep(stored, _built(build))
    return True


def _built(build: Callable[[], None]) -> str:
    """Show what is built and return it."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            build()
    except SystemExit as end:
        if end.code:
            sys.stdout.write(text.getvalue())
            raise
    sys.stdout.write(text.getvalue())
    return text.getvalue()


def _keep(stored: Path, text: str) -> None:
    """Write a text in place of those of other versions and terminals."""
    try:
        shutil.rmtree(stored.parent, ignore_errors=True)
        write_text(stored, text)
    except OSError:
        # A home that cannot be written to makes help slow, never impossible.
        return


def _directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lightning_kd" / "help"


def _fingerprint(words: list[str]) -> str:
    files = sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for folder in (_PACKAGE, _PACKAGE.parent / "callbacks")
        for path in folder.rglob("*.py")
    )
    packages = sorted((each.name, each.version) for each in distributions())
    terminal = (shutil.get_terminal_size(), sys.stdout.isatty(), os.environ.get("NO_COLOR"))
    known = repr((words, sys.version, packages, files, terminal))
    return hashlib.sha256(known.encode()).hexdigest()[:32]
