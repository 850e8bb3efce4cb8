"""What is made again when a run is typed again, and what is not."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_kd.comparison import contents
from lightning_kd.comparison.contents import content_of, sources
from lightning_kd.comparison.execution import Execution, check_unchanged
from lightning_kd.comparison.experiment import Experiment, Layer, Variant
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.plan import plan
from lightning_kd.comparison.reading import merged
from lightning_kd.comparison.records import Records
from lightning_kd.comparison.run_files import write_json
from lightning_kd.imports import OwnModules

OUT = Path("out")
BASE = {
    "model": {"class_path": "SFT", "init_args": {"student": {"config": {}}}},
    "data": {"train": "texts/train.jsonl", "test": "texts/test.jsonl"},
}
WRITTEN = Layer(options={"on_policy": {"path": "written.jsonl"}})
OF_SFT = Layer(options={"model": {"init_args": {"teacher": {"name_or_path": "{SFT}"}}}})


def resolve(command, files, layers):
    """What the parser does, without it."""
    return reduce(merged, [BASE, *layers], {})


class Commands:
    """Commands that leave what the trainer's leave, and are remembered."""

    received = 0

    def __init__(self, *, gives=("test/x",), failing=(), weights="weights"):
        self.gives, self.failing, self.made, self.weights = gives, failing, [], weights

    def stopped(self):
        return False

    @contextmanager
    def listening(self):
        yield

    def run(self, words, left, log):
        command, place = words[0], left.parent
        self.made.append(f"{command} {place.relative_to(OUT)}")
        if str(place.relative_to(OUT)) in self.failing:
            raise OSError(28, "No space left on device")
        if command == "fit":
            (place / "student").mkdir(exist_ok=True)
            (place / "student" / "weights").write_text(self.weights)
            Path("written.jsonl").write_text(f"{len(self.made)} completions")
        found = dict.fromkeys(self.gives if command != "fit" else [], 1.0)
        said = {"metrics": found, "cost": {"seconds": 1.0}, "device": "cpu", "jobs": 1}
        write_json(left, said)
        return 0


def experiment(**changes):
    given = {"metrics": [Metric("test/x")], "variants": [Variant("SFT", Layer(), "SFT")]}
    return Experiment("tiny", "Tiny", **(given | changes))


def planned(said, seeds=(0,)):
    jobs = plan(said, seeds, OUT, {}, resolve)
    names = [metric.name for metric in said.metrics]
    return jobs, Records(jobs, OUT, names, said.all_files)


def made(said, *, rerun=False, seeds=(0,), **commands):
    """Make what is not there; return the commands, and what became of the runs."""
    jobs, records = planned(said, seeds)
    states = check_unchanged(jobs, [records.state(job) for job in jobs], rerun=rerun)
    records.check_metrics(jobs, states)
    workers = Commands(**commands)
    outcomes = Execution(jobs, records, workers, said.metrics, Console()).run_all(states)
    return workers.made, outcomes


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for split in ("train", "test"):
        Path(f"texts/{split}.jsonl").write_text('{"text": "one"}')


def given_a_teacher():
    teacher = {"init_args": {"teacher": {"name_or_path": "teacher"}}}
    Path("teacher").mkdir()
    Path("teacher/model.safetensors").write_text("weights")
    return [Variant("SFT", Layer(options={"model": teacher}), "SFT")]


def given_a_module():
    Path("my_losses.py").write_text("a = 1")
    Path("own.yaml").write_text("model: {init_args: {loss: {class_path: my_losses.Own}}}")
    loss = {"init_args": {"loss": {"class_path": "my_losses.Own"}}}
    return [Variant("SFT", Layer(["own.yaml"], {"model": loss}), "SFT")]


@pytest.mark.parametrize(
    ("variants", "file", "named"),
    [
        (None, "texts/train.jsonl", "texts/train.jsonl"),
        (given_a_teacher, "teacher/model.safetensors", "teacher"),
        (given_a_module, "my_losses.py", "my_losses.py"),
    ],
)
def test_a_file_with_other_contents_makes_a_run_another(variants, file, named):
    said = experiment(variants=variants()) if variants else experiment()
    assert made(said)[0] == ["fit SFT/0", "test SFT/0"]
    assert made(said)[0] == []
    Path(file).write_text("another")
    with pytest.raises(ValueError, match=re.escape(f"(out/SFT/0): the contents of {named}")):
        made(said)
    assert made(said, rerun=True)[0] == ["fit SFT/0", "test SFT/0"]
    assert made(said)[0] == []


def test_a_run_of_a_changed_start_is_another_also_where_only_the_start_was_made_anew():
    said = experiment(variants=[Variant("SFT", Layer(), "SFT"), Variant("KD", OF_SFT, "KD")])
    made(said)
    Path("texts/train.jsonl").write_text("another")
    with pytest.raises(ValueError, match=r"KD, seed 0 \(out/KD/0\): the contents of texts/train"):
        made(said)
    alone = experiment()
    assert made(alone, rerun=True)[0] == ["fit SFT/0", "test SFT/0"]
    with pytest.raises(ValueError, match=r"KD, seed 0 \(out/KD/0\): the contents of texts/train"):
        made(said)
    assert made(said, rerun=True)[0] == ["fit KD/0", "test KD/0"]


def test_other_data_of_the_test_make_the_test_again_alone():
    said = experiment()
    made(said)
    Path("texts/test.jsonl").write_text("another")
    with pytest.raises(ValueError, match=r"the contents of texts/test\.jsonl"):
        made(said)
    assert made(said, rerun=True)[0] == ["test SFT/0"]
    assert made(said)[0] == []


def test_what_runs_write_and_files_that_are_gone_change_nothing():
    Path("written.jsonl").write_text("of another run")
    said = experiment(common=WRITTEN)
    made(said)
    assert Path("written.jsonl").read_text() == "1 completions"
    Path("texts/train.jsonl").unlink()
    assert made(said)[0] == []


def test_a_metric_that_is_not_there_makes_the_test_again_alone(monkeypatch):
    made(experiment())
    monkeypatch.setattr("lightning_kd.comparison.records.sources", lambda: "of other code")
    said = experiment(metrics=[Metric("test/x"), Metric("test/y")])
    commands, (outcome,) = made(said, gives=["test/x", "test/y"])
    assert commands == ["test SFT/0"]
    assert outcome.result["metrics"].keys() == {"test/x", "test/y"}


def test_a_run_that_is_shown_now_is_tested():
    hidden = Variant("SFT", Layer(), "SFT", shown=False)
    assert made(experiment(variants=[hidden], metrics=[]))[0] == ["fit SFT/0"]
    assert made(experiment(metrics=[]))[0] == ["test SFT/0"]
    assert made(experiment(variants=[hidden], metrics=[]))[0] == []


def test_numbers_of_the_other_split_are_measured_there():
    made(experiment(metrics=[Metric("val/x")]), gives=["val/x"])
    with pytest.raises(ValueError, match="validate -> test"):
        made(experiment(metrics=[]))
    assert made(experiment(metrics=[]), rerun=True)[0] == ["test SFT/0"]


def begun():
    """Begin a run, and leave a checkpoint of it."""
    (job,), records = planned(experiment())
    records.prepare(job)
    saved = job.directory / "checkpoints" / "last.ckpt"
    saved.parent.mkdir()
    content = {"global_step": 900, "pytorch-lightning_version": "2.6", "state_dict": {}}
    torch.save({**content, "callbacks": {}, "epoch": 0, "loops": None}, saved)
    return saved


def test_training_goes_on_where_only_the_test_is_another():
    saved = begun()
    said = experiment(common=Layer(test={"data": {"limit": 3}}))
    (job,), records = planned(said)
    (state,) = check_unchanged([job], [records.state(job)], rerun=False)
    assert state.checkpoint == saved
    records.clear(job, state)
    assert saved.exists()


def test_training_that_has_begun_with_other_data_begins_anew_where_that_is_asked_for():
    saved = begun()
    Path("texts/train.jsonl").write_text("another")
    (job,), records = planned(experiment())
    with pytest.raises(ValueError, match=r"the contents of texts/train\.jsonl"):
        check_unchanged([job], [records.state(job)], rerun=False)
    (state,) = check_unchanged([job], [records.state(job)], rerun=True)
    records.clear(job, state)
    assert not saved.exists()


def test_a_record_of_an_earlier_release_is_taken_as_it_is():
    made(experiment())
    for name in ("given.json", "result.json"):
        path = OUT / "SFT" / "0" / name
        old = json.loads(path.read_text())
        for key in ("contents", "sources", "stage", "jobs", "digest"):
            old.pop(key, None)
        write_json(path, old)
    assert made(experiment())[0] == []
    _, (outcome,) = made(experiment(metrics=[Metric("test/y")]), gives=["test/y"])
    assert outcome.result["sources"] == f"{sources()}, unknown"


def test_a_result_says_of_which_code_it_is():
    _, (outcome,) = made(experiment())
    assert outcome.result["sources"] == sources()
    assert outcome.result["jobs"] == 1


def test_the_code_is_known_by_all_its_files(monkeypatch):
    read = []
    monkeypatch.setattr(contents, "_of_file", lambda path, *_: read.append(path))
    sources()
    names = {str(path).partition("lightning_kd/")[2] for path in read}
    assert {"comparison/contents.py", "callbacks/training_cost.py"} <= names


def test_the_librarys_own_code_is_no_module_of_a_user(monkeypatch):
    path = Path("own.yaml").absolute()
    path.write_text("model: {class_path: lightning_kd.SFT}")
    monkeypatch.chdir(Path(contents.__file__).parents[2])
    assert OwnModules.of_arguments([str(path)]).files(["lightning_kd"]) == {}


def test_contents_of_files_directories_and_patterns():
    whole = content_of("texts")
    assert content_of("texts/*.jsonl") is not None
    assert content_of("gpt2") is content_of("texts/*.md") is content_of("") is None
    Path("texts/.lock").touch()
    assert content_of("texts") == whole
    Path("texts/test.jsonl").rename("texts/another.jsonl")
    assert content_of("texts") != whole
    assert content_of("texts", [Path("texts")]) is None


def test_a_run_that_cannot_be_begun_fails_alone():
    said = experiment(variants=[Variant(name, Layer(), name) for name in "AB"])
    said = replace(said, metrics=[])
    commands, (one, other) = made(said, failing=["A/0"])
    assert one.error == "OSError: [Errno 28] No space left on device"
    assert other.result["run"] == "B"
    assert commands == ["fit A/0", "fit B/0", "test B/0"]


def test_a_metric_that_no_run_has_given_ends_the_comparison():
    said = experiment(metrics=[Metric("test/x"), Metric("test/misspelt")])
    commands, (outcome,) = made(said, seeds=[0, 1, 2])
    assert commands == ["fit SFT/0", "test SFT/0"]
    assert "its test gave no test/misspelt; it gave test/x; no run has given" in outcome.error


def test_a_metric_that_another_run_has_given_does_not():
    made(experiment())
    commands, outcomes = made(experiment(), seeds=[0, 1, 2], gives=[])
    assert commands == ["fit SFT/1", "test SFT/1", "fit SFT/2", "test SFT/2"]
    assert [outcome.error for outcome in outcomes] == [
        "",
        *["its test gave no test/x; it gave "] * 2,
    ]
