"""Runs in which one rank has no data: it takes part in every collective."""

import pytest

from tests.support.cpu_strategies import written_under
from tests.support.scripts import needs_deepspeed, written_by

pytestmark = pytest.mark.processes

OF_THE_PARTITIONING = ("padding_share", "count_min", "mean_of_means_error")
"""Diagnostics that depend on the partitioning into micro-batches."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    place = tmp_path_factory.mktemp("idle") / "alone.pt"
    return written_by("callbacks/idle_rank.py", place, "alone", ranks=1)


def compared_with(alone, found):
    """Check that two processes log the same as one."""
    for case, numbers in found.items():
        assert set(numbers) == set(alone[case]), case
        for name, value in numbers.items():
            if not name.endswith(OF_THE_PARTITIONING):
                assert value == pytest.approx(alone[case][name], rel=1e-4, abs=1e-6), (case, name)
    masked = found["nothing scored"]
    assert masked["norm/count_min"] == 0
    assert masked["norm/count_max"] == masked["norm/count"]
    # All that is left of a window of rollouts is one completion, of one rank.
    assert found["minillm drop"]["train/tokens"] == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_every_case_logs_the_same_as_one_process(strategy, alone, tmp_path):
    found = written_by("callbacks/idle_rank.py", tmp_path / "two.pt", strategy)
    assert set(found) == set(alone) - ({"no batch"} if strategy == "fsdp2" else set())
    compared_with(alone, found)
    assert found["own clocks"]["validations"] == 1
    assert found["fp16"]["scale"] == 2.0**16
    assert found["not finite"]["skipped"] == 1


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero_3", marks=needs_deepspeed)])
def test_cases_with_collectives_of_the_strategy_log_the_same_as_one_process(
    strategy, alone, tmp_path
):
    found = written_under(strategy, "callbacks/idle_rank.py", tmp_path / "two.pt")
    assert len(found) == 7
    compared_with(alone, found)
