"""Killed with SIGKILL, and resumed: bit for bit the run that was not killed."""

import os
import signal
from functools import partial
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


def die_at_the_second_checkpoint(*, half_written):
    replace, seen = Path.replace, []

    def replaced(self, target):
        if self.name.endswith(".fresh"):
            seen.append(self)
            if len(seen) > 2:
                if half_written:
                    os.truncate(self, self.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replaced


@pytest.mark.parametrize("half_written", [True, False])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(root, half_written):
    """The process dies in the middle of the second checkpoint's bytes, or before its renaming."""
    reference = uninterrupted("gkd", "one", root)
    prepare = partial(die_at_the_second_checkpoint, half_written=half_written)
    folder, resumed = killed("gkd", "one", root, 100 + half_written, prepare)
    assert resumed
    assert differences(reference, folder, 1) == []
