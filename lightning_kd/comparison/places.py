"""The directory of a comparison, held by one at a time, and what is said if it cannot be written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def cannot(what: str) -> Iterator[None]:
    """Say what cannot be done, where the system refuses it (a full disk, no permission).

    Raises:
        ValueError: If it does.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error}") from error


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a directory for one comparison alone.

    Raises:
        ValueError: If another comparison holds it, or nothing can be written there.
    """
    with cannot(f"--output {output} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / "compare.lock").open("a+")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"another comparison (process {file.read().strip()}) is writing to {output}; wait for "
                "it, or give another --output"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
