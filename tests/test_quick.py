"""What ``make test-quick`` leaves out is marked, and nothing that it runs starts a process."""

import multiprocessing
import subprocess
import sys

import pytest

from tests.support.quick import NOT_QUICK, is_quick
from tests.support.scripts import ROOT


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "--version"]),
        lambda: multiprocessing.get_context("fork").Process().start(),
        lambda: multiprocessing.get_context("spawn").Process().start(),
    ],
    ids=["subprocess", "fork", "spawn"],
)
def test_a_process_of_a_test_without_a_mark_is_refused(start):
    with pytest.raises(pytest.fail.Exception, match=r"mark it with pytest\.mark\.processes"):
        start()


@pytest.mark.processes
def test_a_marked_test_may_start_one():
    assert subprocess.run([sys.executable, "--version"]).returncode == 0


def test_whoever_uses_the_command_line_need_not_remember_it(cli, request):
    assert request.node.get_closest_marker("command_line") is not None
    assert not is_quick(request.node)


def test_the_target_leaves_out_what_is_marked():
    assert f'-m "not ({" or ".join(NOT_QUICK)})"' in (ROOT / "Makefile").read_text()
