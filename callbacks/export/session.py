"""The process that trains: its command, and the commit of its working directory."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import which

from lightning_kd.callbacks.export.redaction import presentable_command
from lightning_kd.version import __version__

_GIT_TIMEOUT = 10.0
"""Seconds that git may take to say which commit the working directory is of."""

_DIRTY = "-dirty"


def this_session() -> dict[str, str]:
    """Return the command of this process, the version of this library and the commit."""
    return {
        "command": shlex.join(presentable_command(sys.argv)),
        "version": __version__,
        "commit": commit_of(Path.cwd()),
    }


def commit_of(directory: Path) -> str:
    """Return the commit that a directory is of, and whether its files differ from it.

    Args:
        directory: A directory, which need not be in a repository.

    Returns:
        The commit, with `` with uncommitted changes`` behind it where tracked files differ; empty
        outside of a repository, and where git has not said it in ten seconds.
    """
    git = which("git")
    inside = any((place / ".git").exists() for place in (directory, *directory.parents))
    if git is None or not inside:
        return ""
    try:
        said = subprocess.run(  # noqa: S603
            [git, "describe", "--always", "--abbrev=40", "--exclude=*", f"--dirty={_DIRTY}"],
            cwd=directory,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # a card without it is better than a run that does not begin
    if said.returncode != 0:
        return ""
    commit = said.stdout.strip()
    clean = commit.removesuffix(_DIRTY)
    return clean if clean == commit else f"{clean} with uncommitted changes"
