"""Student and teacher in shards (FSDP2): the same losses, gradients and weights as one process."""

import pytest

from tests.modules.partition_grid import CUTS, run
from tests.modules.sharded_grid import ADDED, CASES, RUNS, UNSHARDED
from tests.support.scripts import written_by


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return written_by("modules/sharded_grid.py", tmp_path_factory.mktemp("sharded") / "grid.pt")


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("case", [*CASES, *ADDED], ids=lambda case: "-".join(map(str, case)))
def test_two_sharded_processes_equal_one(case, two_processes):
    """Ranks stop writing at different lengths; a window is cut short; the clip is active."""
    whole = run(case, CUTS[0])
    found = [two_processes[case, cut, placement] for cut, placement, cases in RUNS if case in cases]
    if case in UNSHARDED:
        found += [two_processes[case, (2, 1, 4), kind] for kind in ("unsharded", "slots")]
    for other in found:
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-10)
        for a, b in zip(other["gradients"], whole["gradients"], strict=True):
            assert (a - b).norm() / b.norm() < 1e-10
        assert (other["weights"] - whole["weights"]).norm() / whole["weights"].norm() < 1e-12
