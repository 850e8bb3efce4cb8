"""Two processes tell of texts what one does: sums over ranks, never means of means."""

import pytest

from tests.support.scripts import written_by

pytestmark = pytest.mark.processes
SCRIPT = "callbacks/two_rank_likelihoods.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return written_by(SCRIPT, tmp_path_factory.mktemp("alone") / "found.pt", "alone")


def test_numbers_and_documents_are_those_of_one_process(alone, tmp_path):
    found = written_by(SCRIPT, tmp_path / "found.pt", "ddp")
    names = {"test/bits_per_byte", "test/blimp", "test/exposure_bias", "test/acceptance"}
    assert names <= set(alone["numbers"])
    assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-4)
    assert len(alone["documents"]) == 7
    for one, other in zip(alone["documents"], found["documents"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
