"""FSDP1 and ZeRO on two processes: losses, norms, rates and weights of one process."""

import pytest
import torch

from tests.modules.fsdp1_and_zero_grid import ADDED, CASES, CUTS, OF_STRATEGY, run
from tests.support.cpu_strategies import NAMES, written_under

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes come to under a strategy, in one start."""
    known = {}

    def under(name):
        if name not in known:
            out = tmp_path_factory.mktemp(name) / "grid.pt"
            known[name] = written_under(name, "modules/fsdp1_and_zero_grid.py", out)
        return known[name]

    return under


@pytest.fixture(scope="module")
def one_process():
    """The same in float64, once for all strategies."""
    known = {}

    def of(case):
        if case not in known:
            known[case] = run(case, (1, 1, 8), dtype=torch.float64, precision="64-true")
        return known[case]

    return of


def cases(name):
    return OF_STRATEGY.get(name, CASES)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_near_and_keeps_its_positions(name, two_processes, one_process):
    """Frequencies of RoPE that are rounded would turn a token at place 1,000 by radians."""
    case = cases(name)[0]
    found, whole = two_processes(name)["bf16"], one_process(case)
    assert found["losses"] == pytest.approx(whole["losses"], rel=0.03)
    assert found["losses"] != pytest.approx(whole["losses"], rel=1e-6)
    assert found["buffers"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(
            *name.values, case, marks=name.marks, id="-".join(map(str, name.values + case))
        )
        for name in NAMES
        for case in cases(*name.values)
    ],
)
def test_two_processes_equal_one(name, case, two_processes, one_process):
    """Rows are ragged, rank by rank as well; weights are tied, or clipping is active, or rollouts end
    at different lengths."""
    for cut in CUTS.get(name, [(2, 1, 4)]):
        check(two_processes(name)[case, cut], one_process(case))


@pytest.mark.parametrize("case", ADDED, ids=lambda case: case[0])
def test_options_of_methods_and_teachers_with_other_tokens_too(case, two_processes, one_process):
    check(two_processes("fsdp")[case, CUTS["fsdp"][-1]], one_process(case))


def check(found, whole):
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert found["logged"] == pytest.approx(whole["logged"], rel=1e-5)
    assert found["after"].keys() == whole["after"].keys()
    for weight, expected in whole["after"].items():
        moved = (expected - whole["before"][weight]).norm()
        # Around 1, float32 rounds by 6e-8, and many of these have hardly moved.
        assert (found["after"][weight] - expected).norm() < 1e-4 * moved + 1e-6, weight
