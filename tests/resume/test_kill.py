"""Killed with SIGKILL, and resumed: bit for bit the run that was not killed."""

import os
import signal
from pathlib import Path

import pytest

from tests.resume.kill_runs import (
    METHODS,
    STRATEGIES,
    differences,
    killed,
    models,
    uninterrupted,
)

POINTS = 2
"""Of each pair; ``python -m tests.resume.kill_runs`` tries more."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    models(folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(method, strategy, root):
    world = 1 if strategy == "one" else 2
    reference = uninterrupted(method, strategy, root)
    for point in range(POINTS):
        folder, _ = killed(method, strategy, root, point)
        assert differences(reference, folder, world) == []


@pytest.mark.parametrize("write", [0, 5])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(root, write):
    """The process dies in the middle of the second checkpoint's bytes, or before its renaming."""
    reference = uninterrupted("gkd", "one", root)

    def die_within_the_second_checkpoint():
        replace, seen = Path.replace, []

        def replaced(self, target):
            if self.name.endswith(".fresh"):
                seen.append(self)
                if len(seen) > 2:
                    if write == 0:
                        os.truncate(self, self.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = replaced

    folder, resumed = killed("gkd", "one", root, 100 + write, die_within_the_second_checkpoint)
    assert resumed
    assert differences(reference, folder, 1) == []
