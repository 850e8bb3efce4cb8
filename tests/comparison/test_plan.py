"""Which runs there are, in which order, and what each is given."""

from functools import reduce
from pathlib import Path

import pytest

from lightning_kd.comparison.experiment import Experiment, Layer, Variant
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.outputs import written_files
from lightning_kd.comparison.plan import plan
from lightning_kd.comparison.reading import merged

OUT = Path("out")
BASE = {"model": {"class_path": "SFT", "init_args": {"student": {"config": {}}}}, "data": {}}


def resolve(command, files, layers):
    """What the parser does, without it."""
    return reduce(merged, [BASE, *layers], {"command": command})


def variant(name, student=None, *, test=None, **options):
    model = {"init_args": {"student": {"name_or_path": student}}}
    layer = Layer(options={"model": model} if student else {}, test=test or {})
    return Variant(name, layer, name, **options)


DOCUMENTS = {"class_path": "lightning_kd.callbacks.DocumentLikelihoods"}


def saving(place):
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    return {"class_path": path, "init_args": {"every_n_train_steps": 5, "dirpath": place}}


def planned(*variants, seeds=(0,), values=None, quick=False, smaller=None, **options):
    experiment = Experiment("tiny", "Tiny", variants, quick=smaller, **options)
    return plan(experiment, seeds, OUT, values or {}, resolve, quick=quick)


def test_a_run_comes_after_those_whose_students_it_starts_from():
    jobs = planned(variant("B", "{A}"), variant("C", "{B}"), variant("A"), seeds=[3, 5])
    assert [(job.variant.name, job.seed) for job in jobs] == [
        *[(name, 3) for name in "ABC"],
        *[(name, 5) for name in "ABC"],
    ]
    start = jobs[1].fit["model"]["init_args"]["student"]["name_or_path"]
    assert start == "out/A/3/student"
    assert jobs[1].fit_reads == [OUT / "A" / "3"]
    assert jobs[1].directory == OUT / "B" / "3"


def test_what_a_comparison_decides_is_in_every_configuration():
    (job,) = planned(Variant("A", Layer(), "A", seed_times=2, seed_plus=1), seeds=[4])
    assert job.fit["seed_everything"] == 9
    assert job.fit["export"] == {"dirpath": "out/A/4/student"}
    assert job.fit["trainer"]["logger"]["init_args"]["name"] == "A/4"
    assert job.test["command"] == "test"
    assert job.test["trainer"]["logger"] is False
    assert job.test["model"]["init_args"]["student"]["name_or_path"] == "out/A/4/student"


def test_each_budget_has_runs_of_its_own_but_for_those_that_are_made_once():
    budgets = {
        "steps": Layer(options={"trainer": {"max_steps": 7}}),
        "time": Layer(options={"trainer": {"max_time": "00:00:01:00"}}),
    }
    jobs = planned(variant("A", once=True), variant("B", "{A}"), budgets=budgets)
    runs = [variant("A", once=True), variant("B", "{A}")]
    assert Experiment("tiny", "Tiny", runs, budgets=budgets).runs_of_a_seed == len(jobs)
    places = [str(job.directory) for job in jobs]
    assert places == ["out/A/0", "out/steps/B/0", "out/time/B/0"]
    assert [job.fit["trainer"].get("max_steps") for job in jobs] == [None, 7, None]
    assert jobs[2].fit["trainer"]["max_time"] == "00:00:01:00"
    assert [job.budget for job in jobs] == ["", "steps", "time"]
    with pytest.raises(ValueError, match="A is trained once for all budgets, but reads B"):
        planned(variant("A", "{B}", once=True), variant("B"), budgets=budgets)


def test_smaller_sizes_come_last():
    common, quick = (Layer(options={"trainer": {"max_steps": n}}) for n in (100, 1))
    (job,) = planned(variant("A"), quick=True, common=common, smaller=quick)
    assert job.fit["trainer"]["max_steps"] == 1
    with pytest.raises(ValueError, match="tiny says no smaller sizes"):
        planned(variant("A"), quick=True)


def test_placeholders_stand_for_values_of_their_type_but_not_in_templates():
    options = {
        "trainer": {"max_steps": "{steps}"},
        "data": {"train": "{data}/train.txt", "prompt_template": "Q: {question}"},
    }
    job = planned(
        Variant("A", Layer(options=options), "A"), values={"steps": 5, "data": "../texts"}
    )[0]
    assert job.fit["trainer"]["max_steps"] == 5
    assert job.fit["data"] == {"train": "../texts/train.txt", "prompt_template": "Q: {question}"}


def test_all_are_tested_with_one_teacher_who_is_tested_too():
    test = {"model": {"init_args": {"teacher": "{T}"}}}
    jobs = planned(variant("A"), variant("T"), common=Layer(test=test))
    assert [job.variant.name for job in jobs] == ["T", "A"]
    assert {job.test["model"]["init_args"]["teacher"] for job in jobs} == {"out/T/0/student"}
    assert (jobs[0].test_reads, jobs[1].test_reads) == ([], [OUT / "T" / "0"])
    assert "teacher" not in jobs[1].fit["model"]["init_args"]


def test_metrics_of_the_validation_split_are_measured_there():
    (job,) = planned(variant("A"), metrics=[Metric("val/loss")])
    assert (job.stage, job.test["command"]) == ("validate", "validate")


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ([variant("A", "{B}"), variant("B", "{A}")], {}, "runs read each other: A <- B <- A"),
        ([variant("A", "{A}")], {}, "A starts from its own student"),
        (
            [variant("A", "{Bb}"), variant("B")],
            {},
            r"\{Bb\} stands for nothing; did you mean \{B\}",
        ),
        ([variant("A", "{student}")], {}, r"\{student\} stands for nothing"),
        (
            [Variant("A", Layer(options={"trainer": {"logger": {"class_path": "x"}}}), "A")],
            {},
            "run A: trainer.logger is given, but a comparison",
        ),
        (
            [Variant("A", Layer(options={"trainer.logger": {"class_path": "x"}}), "A")],
            {},
            "run A: trainer.logger is given, but a comparison",
        ),
        (
            [Variant("A", Layer(options={"trainer": {"callbacks": [saving("x")]}}), "A")],
            {},
            r"run A: trainer\.callbacks\.0\.init_args\.dirpath is given, but a comparison",
        ),
        (
            [Variant("A", Layer(options={"trainer": {"callbacks+": saving("x")}}), "A")],
            {},
            r"run A: trainer\.callbacks\.init_args\.dirpath is given, but a comparison",
        ),
        (
            [variant("A", test={"trainer": {"callbacks": [saving("x")]}})],
            {},
            r"run A: trainer\.callbacks\.0\.init_args\.dirpath is given, but a comparison",
        ),
        (
            [Variant("A", Layer(options={"non_finite": {"dirpath": "x"}}), "A")],
            {},
            r"run A: non_finite\.dirpath is given, but a comparison",
        ),
        (
            [variant("B"), variant("A", test={"model": {"init_args": {"student": {"x": "{B}"}}}})],
            {},
            r"run A: test\.model\.init_args\.student\.x is out/B/0/student, but a run is",
        ),
        (
            [
                Variant(name, Layer(options={"on_policy": {"path": "x.jsonl"}}), name)
                for name in "AB"
            ],
            {},
            r"on_policy\.path is x\.jsonl in two runs \(A, seed 0, and B, seed 0\)",
        ),
        (
            [variant("A"), variant("B")],
            {"common": Layer(test={"trainer": {"callbacks": [DOCUMENTS]}})},
            r"callbacks\.0\.init_args\.path is documents\.jsonl in two runs \(A, seed 0, and B",
        ),
        (
            [variant("A")],
            {"common": Layer(options={"data": {"init_args": {"train": "a", "test": None}}})},
            r"data\.test is not given",
        ),
    ],
)
def test_what_could_not_be_run_is_refused(variants, options, message):
    with pytest.raises(ValueError, match=message):
        planned(*variants, **options)


def test_runs_whose_tests_write_beside_their_students_write_files_of_their_own():
    writing = DOCUMENTS | {"init_args": {"path": "{student}_documents.jsonl"}}
    common = Layer(test={"trainer": {"callbacks": [writing]}})
    jobs = planned(variant("A"), variant("B"), common=common)
    (callback,) = jobs[1].test["trainer"]["callbacks"]
    assert callback["init_args"]["path"] == "out/B/0/student_documents.jsonl"
    assert written_files(jobs[0].test) == {
        "trainer.callbacks.0.init_args.path": "out/A/0/student_documents.jsonl"
    }


def test_options_of_a_file_that_a_comparison_decides_are_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("export: {push_to_hub: user/name}")
    with pytest.raises(ValueError, match=r"export\.push_to_hub is given"):
        planned(Variant("A", Layer([str(path)]), "A"))


@pytest.mark.parametrize("word", ["A", "data", "seed", "student"])
def test_a_word_in_braces_in_a_file_is_refused_where_nothing_fills_it_in(word, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f'data: {{train: "{{{word}}}/train.jsonl", prompt_template: "{{data}}"}}')
    with pytest.raises(ValueError, match=rf"run B: \{{{word}\}} stands in .*own\.yaml, where"):
        planned(variant("A"), Variant("B", Layer([str(path)]), "B"), values={"data": "x"})
