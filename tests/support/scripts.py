"""Scripts of the tests that need processes of their own."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(f"{sys.prefix}-deepspeed") / "bin" / "python"
"""An environment of its own: where DeepSpeed can be imported, it writes to everybody's output."""

needs_deepspeed = pytest.mark.skipif(
    not DEEPSPEED.parents[1].joinpath("installed").exists(),
    reason="no DeepSpeed beside this environment; make deepspeed builds it",
)

# By the server from which processes are forked, once.
multiprocessing.set_forkserver_preload(["lightning_kd.cli.main", "tests.support.scripts"])

LIMIT = 500.0
"""Seconds that a script has."""


def forked(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that is forked from one that has imported everything and run nothing.

    Args:
        target: A function of a module.
        *arguments: Its arguments.
    """
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def rank_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of a rank that somebody else has started."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{world}"}
    return place | {"LOCAL_RANK": f"{rank}", "RANK": f"{rank}"}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _as_rank(words: Sequence[str], variables: dict[str, str], folder: str, log: Path) -> None:
    """Run a script as if it had been started with these words."""
    os.chdir(folder)
    os.environ |= variables
    sys.argv, sys.stdout = [*words], log.open("a", buffering=1)
    sys.stderr = sys.stdout
    os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)
    runpy.run_path(words[0], run_name="__main__")


def run_script(script: str, out: Path, *arguments: str, ranks: int = 2) -> None:
    """Run a script under ``tests/``, which is told where to write.

    Args:
        script: Its path there.
        out: The first word behind it.
        *arguments: Further words.
        ranks: Processes, of which each knows its rank; 1 is no rank of anything.
    """
    words, port = [str(ROOT / "tests" / script), str(out), *arguments], free_port()
    logs = [Path(f"{out}_log_{rank}.txt") for rank in range(ranks)]
    processes = [
        forked(
            _as_rank,
            words,
            rank_variables(rank, ranks, port) if ranks > 1 else {},
            os.getcwd(),
            log,
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join(LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert not any(codes), (codes, *(log.read_text()[-3000:] for log in logs))
    assert None not in codes, f"{script} takes more than {LIMIT:g} s"


def written_by(script: str, out: Path, *arguments: str, ranks: int = 2) -> Any:
    """What a script writes to the file that it is given."""
    run_script(script, out, *arguments, ranks=ranks)
    return torch.load(out, weights_only=True)


def written_beside_deepspeed(script: str, out: Path, *arguments: str) -> Any:
    """The same where DeepSpeed can be imported; the script starts its second process."""
    done = subprocess.run(
        [DEEPSPEED, ROOT / "tests" / script, out, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    # DeepSpeed's third stage sometimes aborts on a CPU, after everything has been written.
    aborted = done.returncode == -signal.SIGABRT and out.exists()
    assert done.returncode == 0 or aborted, done.stderr[-3000:]
    return torch.load(out, weights_only=True)
