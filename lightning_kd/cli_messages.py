"""What the command line says of an error: a few lines that help."""

import re
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import lightning
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the description as they stand."""


class ShortErrorParser(LightningArgumentParser):
    """Says what is wrong in a few lines and exits with 2, never with a traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the lines of ``message`` that help, and exit."""
        text = shorten(message)
        if re.match("Problems parsing config|Unexpected config", text):
            names = [b for a, b in pairwise(sys.argv) if a in {"--config", "-c"}]
            text += f"\n  (in {' or '.join(names)})"
        sys.stderr.write(f"lightning-kd: error: {text}\n")
        raise SystemExit(2)


def shorten(message: str) -> str:
    """The lines of a jsonargparse message that say what came and what was expected.

    Example:
        >>> print(shorten('''Parser key "model":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'JSD'>, <class 'NoneType'>]
        ...   Errors:
        ...     - beta is 3.0; it must lie in [0, 1]
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'float'>'''))
        Parser key "model":
          beta is 3.0; it must lie in [0, 1]
    """
    noise = re.compile(
        r"NoneType|Subtypes:|Given value type|Given value: .{80}|Does not validate|Errors:"
    )
    # A text is often one of several choices; where it is the only one, it is what was expected.
    lines = [line for line in message.splitlines() if line.strip() and not noise.search(line)]
    others = [line for line in lines if "Expected a <class 'str'>" not in line]
    if all(line.startswith(("Parser key", "Problem")) for line in others):
        others = [*lines, 'in a file, text with a colon or braces needs quotes: "Q: {prompt}"']
    texts = list(dict.fromkeys(line.strip().removeprefix("- ") for line in others))
    return "\n  ".join(texts) or message


def is_for_the_user(error: BaseException) -> bool:
    """Is it a message from this library or Lightning, or a defect somewhere below them?"""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    home = Path(__file__).resolve().parent
    homes = (home, (home / "callbacks").resolve(), Path(lightning.__file__).resolve().parent)
    return any(last.is_relative_to(folder) for folder in homes)
