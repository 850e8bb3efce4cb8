"""A teacher that is served by a process of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE = 120
"""Seconds in which a server must be up."""


@contextmanager
def serving(teacher: Path) -> Iterator[str]:
    """Serve the teacher of a directory with one thread; yields the server's address."""
    line = [sys.executable, "-m", "lightning_kd", "serve", "--port", "0"]
    line += ["--teacher.name_or_path", str(teacher)]
    log = teacher.parent / "server.log"
    with log.open("w") as out:
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, env=threads, stdout=out, stderr=out)
    try:
        until = time.monotonic() + _PATIENCE
        while not (found := re.search(r" at (http://\S+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no server came up: {log.read_text()}")
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)
