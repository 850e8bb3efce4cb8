"""A server that fails one process ends the run of all, with one checkpoint to go on from."""

import pytest

from tests.support.scripts import written_by


@pytest.mark.processes
def test_all_processes_hear_of_a_failure_and_save(tmp_path):
    found = written_by("serving/two_ranks.py", tmp_path / "found.pt")
    assert "the teacher of another process has failed; process 1: " in found["message"]
    assert found["saved"] == 3
    assert found["same"]
