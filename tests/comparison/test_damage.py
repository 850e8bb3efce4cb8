"""Directories of runs that are damaged, cut short, copied, edited or somebody else's."""

import json
import re
import shutil

import pytest

from lightning_kd.comparison.experiment import Layer, Variant
from lightning_kd.comparison.metrics import Metric
from tests.comparison.test_records import OF_SFT, OUT, begun, experiment, made, texts

__all__ = ["texts"]  # a fixture
TWO = [Variant(name, Layer(), name) for name in "AB"]
RUN = OUT / "SFT" / "0"


def edit(**changes):
    path = RUN / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_student_is_not_tested_again():
    made(experiment())
    (RUN / "student" / "weights").write_text("weighted")
    (RUN / "result.json").unlink()
    commands, (outcome,) = made(experiment())
    assert commands == []
    assert "the student in out/SFT/0/student is damaged" in outcome.error
    assert "(weights); remove out/SFT/0 to have the run made anew" in outcome.error
    # Nor is another run trained from it.
    said = experiment(variants=[Variant("SFT", Layer(), "SFT"), Variant("KD", OF_SFT, "KD")])
    assert made(said)[0] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"test/x": 0.5}}, "its result.json is not what was written"),
        ({"seed": 1}, "its result.json is of seed 1 and not 0"),
        ({"budget": "time"}, "its result.json is of budget 'time' and not ''"),
        ({"test": "0" * 16}, "its result.json is of test '0000000000000000' and not"),
    ],
)
def test_a_result_that_was_edited_does_not_count(changes, said):
    made(experiment())
    edit(**changes)
    with pytest.raises(ValueError, match=re.escape(f"(out/SFT/0): {said}")):
        made(experiment())
    assert made(experiment(), rerun=True)[0] == ["test SFT/0"]
    assert made(experiment())[0] == []


def test_the_result_of_another_run_does_not_count():
    said = experiment(variants=TWO)
    made(said)
    shutil.copy("out/A/0/result.json", "out/B/0/result.json")
    with pytest.raises(
        ValueError, match=r"\(out/B/0\): its result\.json is of run 'A' and not 'B'"
    ):
        made(said)


@pytest.mark.parametrize("name", ["result.json", "fit.json", "test.json"])
@pytest.mark.parametrize("text", ["", '{"metrics": {', "null"])
def test_a_record_that_is_cut_short_is_not_there(name, text):
    made(experiment())
    (RUN / name).write_text(text)
    fit = ["fit SFT/0"] if name == "fit.json" else []
    assert made(experiment())[0] == [*fit, "test SFT/0"]


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_run_whose_record_is_cut_short_is_named_and_the_others_are_made(text):
    place = OUT / "A" / "0"
    place.mkdir(parents=True)
    (place / "given.json").write_text(text)
    commands, (outcome, _) = made(experiment(variants=TWO))
    assert commands == ["fit B/0", "test B/0"]
    assert outcome.error.startswith("out/A/0/given.json is cut short")
    assert "remove out/A/0" in outcome.error


def test_a_run_whose_checkpoint_is_cut_short_is_named_and_the_others_are_made():
    saved = begun()
    saved.write_bytes(saved.read_bytes()[:100])
    said = experiment(variants=[Variant("SFT", Layer(), "SFT"), *TWO])
    commands, (outcome, *_) = made(said)
    assert commands == ["fit A/0", "test A/0", "fit B/0", "test B/0"]
    assert "out/SFT/0/checkpoints/last.ckpt" in outcome.error
    assert outcome.error.endswith("or remove out/SFT/0 to begin anew")
    assert saved.exists()


def test_a_directory_that_no_comparison_has_made_is_left_alone():
    RUN.mkdir(parents=True)
    (RUN / "thesis.tex").write_text("years of work")
    for rerun in (False, True):
        with pytest.raises(
            ValueError, match=r"out/SFT/0 is there and was not made by .* thesis\.tex"
        ):
            made(experiment(), rerun=rerun)
    assert (RUN / "thesis.tex").exists()
    (RUN / "thesis.tex").rename(RUN / "fit.yaml")  # as a comparison that was killed at once leaves
    assert made(experiment())[0] == ["fit SFT/0", "test SFT/0"]


def test_a_metric_that_the_tests_there_have_not_given_is_refused_and_their_results_stay():
    said = experiment()
    made(said, seeds=[0, 1])
    misspelt = experiment(metrics=[Metric("test/xx")])
    with pytest.raises(ValueError, match=r"that are there gave test/xx; did you mean test/x\?"):
        made(misspelt, seeds=[0, 1])
    assert made(said, seeds=[0, 1])[0] == []
