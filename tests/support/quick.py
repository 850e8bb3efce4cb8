"""Which tests are quick: what marks the others, and what keeps processes out of those left."""

import multiprocessing.process
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn
from unittest.mock import patch

import pytest

NOT_QUICK = ("processes", "command_line", "slow")
"""Markers of tests that ``make test-quick`` leaves out; ``pyproject.toml`` says what each means."""

BY_FIXTURE = {
    "cli": "command_line",
    "distributions": "processes",
    "fails": "command_line",
    "two_processes": "processes",
    "wheel": "processes",
}
"""The marker of every test that uses a fixture."""

STARTS = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
)
"""What starts a process that imports something or works for long.

A bare fork is none of these: every chat template is rendered in one, and it costs nothing."""


def mark_by_fixture(items: list[pytest.Item]) -> None:
    """Mark tests by what they use, so that nobody needs to remember it."""
    for item in items:
        for name in BY_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(BY_FIXTURE[name])


def is_quick(item: pytest.Item) -> bool:
    """Whether ``make test-quick`` runs a test."""
    return not any(item.get_closest_marker(name) for name in NOT_QUICK)


@contextmanager
def no_process_started() -> Iterator[None]:
    """Fail the test that starts a process, with what to do."""

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail(
            "this test starts a process and is not marked: mark it with pytest.mark.processes, "
            "so that make test-quick leaves it out"
        )

    with ExitStack() as patches:
        for place, name in STARTS:
            patches.enter_context(patch.object(place, name, refuse))
        yield
