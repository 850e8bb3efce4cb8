"""A run on a device that is killed several times goes on as one that is not."""

import pytest

from tests.resume.kill_runs import Kill, differences, killed, models, uninterrupted

KILLS = [
    Kill("checkpoint just in place", 2),
    Kill("micro-batch ended"),
    Kill("validation ended, not saved"),
]


@pytest.mark.processes
@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(device, method, tmp_path):
    strategy = "cuda" if device == "cuda" else "one"
    models(tmp_path)
    reference = uninterrupted(method, strategy, "steps", tmp_path)
    killed(method, strategy, "steps", tmp_path, 0, KILLS)
    assert differences(reference, tmp_path / f"{method}_{strategy}_steps_0", 1) == []
