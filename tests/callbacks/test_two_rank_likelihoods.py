"""Two processes tell of texts what one does: sums over ranks, never means of means."""

import pytest

from tests.support.scripts import written_by

pytestmark = pytest.mark.processes
SCRIPT = "callbacks/two_rank_likelihoods.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    def of(texts):
        if texts not in found:
            place = tmp_path_factory.mktemp("alone") / "found.pt"
            found[texts] = written_by(SCRIPT, place, "alone", texts, ranks=1)
        return found[texts]

    found = {}
    return of


NAMES = {
    *("bits_per_byte", "perplexity", "reverse_kl", "blimp", "blimp_morphology"),
    *("completions_cut", "exposure_bias_r", "exposure_bias_epsilon_sum"),
    *("exposure_bias", "exposure_bias_2", "acceptance", "own_acceptance", "own_reverse_kl"),
    *("own_teacher_nats_per_token", "own_top_k_overlap", "tokens_per_teacher_call"),
    *("exact_match", "rouge_l", "distinct_1", "distinct_3", "repetition_1"),
}


@pytest.mark.parametrize(
    ("strategy", "texts"), [("ddp", "sampled"), ("fsdp2", "sampled"), ("ddp", "given")]
)
def test_numbers_and_documents_are_those_of_one_process(alone, tmp_path, strategy, texts):
    alone = alone(texts)
    found = written_by(SCRIPT, tmp_path / "found.pt", strategy, texts)
    assert {f"{stage}/{name}" for stage in ("val", "test") for name in NAMES} <= set(
        alone["numbers"]
    )
    assert found["numbers"] == pytest.approx(alone["numbers"], rel=1e-4)
    if texts == "given":  # of which some are cut, and student and teacher end at different lengths
        assert 0 < alone["numbers"]["test/completions_cut"] < 1
        assert alone["numbers"]["test/exposure_bias"] != 0
    assert len(alone["documents"]) == 7
    for one, other in zip(alone["documents"], found["documents"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
