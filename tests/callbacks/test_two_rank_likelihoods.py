"""Two processes tell of texts what one does: sums over ranks, never means of means."""

import pytest

from tests.support.scripts import written_by

pytestmark = pytest.mark.processes
SCRIPT = "callbacks/two_rank_likelihoods.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return written_by(SCRIPT, tmp_path_factory.mktemp("alone") / "found.pt", "alone")


NAMES = {
    *("bits_per_byte", "perplexity", "reverse_kl", "blimp", "blimp_morphology"),
    *("exposure_bias", "exposure_bias_2", "acceptance", "own_acceptance", "own_reverse_kl"),
    *("own_teacher_nats_per_token", "own_top_k_overlap", "tokens_per_teacher_call"),
    *("exact_match", "rouge_l", "distinct_1", "distinct_3", "repetition_1"),
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_numbers_and_documents_are_those_of_one_process(alone, tmp_path, strategy):
    found = written_by(SCRIPT, tmp_path / "found.pt", strategy)
    assert {f"{stage}/{name}" for stage in ("val", "test") for name in NAMES} <= set(
        alone["numbers"]
    )
    assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-4)
    assert len(alone["documents"]) == 7
    for one, other in zip(alone["documents"], found["documents"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
