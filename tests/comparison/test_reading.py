"""What an experiment file may say, and what is refused by name."""

import pytest
import yaml

from lightning_kd.comparison.experiment import Claim
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.plan import values_of
from lightning_kd.comparison.reading import of_configs, read_experiment

RUNS = {"A": {"model": {"class_path": "SFT"}}, "B": {}}


def written(tmp_path, **said):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_an_experiment_is_what_its_file_says(tmp_path):
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 1}")
    path = written(
        tmp_path,
        title="Two",
        questions=["Which?"],
        config="base.yaml",
        tokenizers={"bpe": {"files": "a.txt"}},
        common={"test": {"trainer": {"limit_test_batches": 1}}},
        runs=RUNS | {"C": {"once": True, "shown": False, "seed_everything": {"times": 2}}},
        budgets={"steps": {"trainer": {"max_steps": 5}}},
        metrics={"test/loss": "lower", "test/x": {"better": "higher", "percent": True}},
        pairs=[["A", "B"]],
        claims=[{"run": "A", "beats": "B", "metric": "test/x", "source": "a paper"}],
    )
    made = read_experiment(path)
    assert (made.name, made.title, made.questions) == ("tiny", "Two", ["Which?"])
    assert made.common.files == [str(tmp_path / "base.yaml")]
    assert made.common.test == {"trainer": {"limit_test_batches": 1}}
    assert [(v.name, v.once, v.shown, v.seed_times) for v in made.variants] == [
        ("A", False, True, 1),
        ("B", False, True, 1),
        ("C", True, False, 2),
    ]
    assert made.metrics == [Metric("test/loss", "lower"), Metric("test/x", "higher", percent=True)]
    assert made.pairs == [("A", "B")]
    assert made.claims == [Claim("A", "B", "test/x", "a paper")]
    assert made.tokenizers == {"bpe": {"files": "a.txt"}}
    assert made.all_files == [str(path), str(tmp_path / "base.yaml")]


def test_variations_are_runs_for_each_combination(tmp_path):
    path = written(
        tmp_path,
        variations={
            "model.init_args.divergence": ["forward_kl", "reverse_kl"],
            "model.init_args.normalization": {"own": {"class_path": "ConstantLength"}},
        },
    )
    first, second = read_experiment(path).variants
    assert (first.name, second.name) == ("forward_kl,own", "reverse_kl,own")
    assert second.layer.options == {
        "model": {
            "init_args": {
                "divergence": "reverse_kl",
                "normalization": {"class_path": "ConstantLength"},
            }
        }
    }


def test_a_run_has_variations_over_its_own_options(tmp_path):
    run = {"trainer": {"max_steps": 3}, "variations": {"trainer.gradient_clip_val": [1.0, 2.0]}}
    (first, second) = read_experiment(written(tmp_path, runs={"A": run})).variants
    assert (first.name, second.label) == ("A-1.0", "A 2.0")
    assert first.layer.options == {"trainer": {"max_steps": 3, "gradient_clip_val": 1.0}}


def test_ordinary_configs_are_runs_under_their_names(tmp_path):
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        path.write_text("trainer: {max_steps: 1}")
    made = of_configs(paths)
    assert [v.name for v in made.variants] == ["a", "b"]
    assert made.variants[0].layer.files == [str(paths[0])]
    with pytest.raises(ValueError, match="a is the name of two runs"):
        of_configs([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"run": RUNS}, "there is no 'run'; did you mean runs"),
        ({}, "there are no runs"),
        ({"runs": ["A"]}, "runs holds names"),
        ({"runs": {"A": {"modl": {}}}}, r"runs.A: there is no 'modl'; did you mean model"),
        ({"runs": {"A": {"seed_everything": 3}}}, "seed_everything holds names"),
        ({"runs": {"A": {"seed_everything": {"time": 3}}}}, "did you mean times"),
        ({"runs": {"A": {"seed_everything": {"plus": -3}}}}, "plus is -3; it is a whole number"),
        ({"runs": {"A": {"once": "yes please"}}}, "once is 'yes please'"),
        ({"runs": {"A": {"export": {"dirpath": "x"}}}}, "export: there is no 'dirpath'"),
        ({"runs": {"A": {"config": "gone.yaml"}}}, "there is no file .*gone.yaml"),
        ({"runs": {"A/B": {}}}, "'A/B' is no name"),
        ({"runs": {"seed": {}}}, "'seed' is no name"),
        ({"runs": {"A": {}}, "budgets": {"A": {}}}, "A is the name of two runs, budgets"),
        ({"runs": {"A": {}}, "tokenizers": {"A": {}}}, "A is the name of two runs, budgets"),
        ({"runs": {"A": {}}, "tokenizers": {"t": "gpt2"}}, "tokenizers.t holds names and what"),
        ({"runs": RUNS, "variations": {"modl.x": [1]}}, "did you mean model"),
        ({"runs": RUNS, "variations": {"model.x": [{"a": 1}]}}, "where a value has options"),
        ({"runs": RUNS, "pairs": [["A", "C"]]}, "pairs: there is no 'C'"),
        ({"runs": RUNS, "pairs": [["A", "A"]]}, "pairs: A does not differ from itself"),
        ({"runs": RUNS, "pairs": [["A", "B"]] * 2}, "difference of A and B stands there twice"),
        ({"runs": RUNS, "pairs": [["A", "B"], ["B", "A"]]}, "of A and B stands there twice"),
        ({"runs": {"report.json": {}}}, "'report.json' is what a comparison itself writes"),
        ({"runs": {"tokenizers": {}}}, "'tokenizers' is what a comparison itself writes"),
        ({"runs": RUNS, "budgets": {"bars_x.png": {}}}, "'bars_x.png' is what a comparison"),
        ({"runs": RUNS | {"C": {"shown": False}}, "pairs": [["A", "C"]]}, "pairs: there is no 'C'"),
        ({"runs": {"A": {"label": "KD"}, "B": {"label": "KD"}}}, "KD is the label of two runs"),
        ({"runs": {"A": {"predictions": {"path": "x"}}}}, "there is no 'predictions'"),
        ({"runs": RUNS, "costs": ["second"]}, "there is no 'second'; did you mean seconds"),
        (
            {"runs": RUNS, "metrics": {"test/a": "more"}},
            "test/a.better is 'more'; choose higher or lower",
        ),
        ({"runs": RUNS, "metrics": {"test/a": {"title": 3}}}, "title is 3; it must be a str"),
        ({"runs": RUNS, "metrics": {"test/a": {"beter": "lower"}}}, "a metric has better"),
        ({"runs": RUNS, "metrics": ["test/a", "val/b"]}, "all of the test split"),
        ({"runs": RUNS, "questions": "Which?"}, "questions is a list of texts"),
    ],
)
def test_what_no_experiment_has_is_refused(said, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_experiment(written(tmp_path, **said))


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_experiment(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("runs:\n  GKD: {}\n  GKD: {}\n", 3),
        ("runs: {A: {}}\nmetrics:\n  test/x: lower\n  test/x: higher\n", 4),
        ("runs: {A: {}}\nruns: {B: {}}\n", 2),
        ("runs: {A: {}}\nquestions:\n- a: 1\n  a: 2\n", 4),
    ],
)
def test_a_name_that_stands_twice_is_refused(text, line, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"x\.yaml, line {line}: .* stands there for the second time"
    ):
        read_experiment(path)
    with pytest.raises(ValueError, match="for the second time"):
        of_configs([path])


def test_a_name_that_an_anchor_gives_may_be_given_again(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "runs:\n  A: &a {trainer: {max_steps: 3}}\n  B: {<<: *a, trainer: {max_steps: 4}}\n"
    )
    assert read_experiment(path).variants[1].layer.options == {"trainer": {"max_steps": 4}}


def test_every_placeholder_that_has_no_value_is_named(tmp_path):
    said = {"data": "directory of the texts", "teacher": {"help": "model"}, "n": {"default": 3}}
    made = read_experiment(written(tmp_path, runs=RUNS, placeholders=said))
    with pytest.raises(ValueError, match="needs") as refused:
        values_of(made, [])
    assert "--set data=...  directory of the texts" in str(refused.value)
    assert "--set teacher=...  model" in str(refused.value)
    given = ["data=../x", "teacher=a=b", "n=5"]
    assert values_of(made, given) == {"data": "../x", "teacher": "a=b", "n": 5}
    typed = {"010": "010", "1:30": "1:30", "yes": "yes", "1_000": "1_000", "true": True, "0.5": 0.5}
    for text, value in typed.items():
        assert values_of(made, [f"data={text}", "teacher=t"])["data"] == value
    with pytest.raises(ValueError, match="no placeholder 'date'; did you mean data"):
        values_of(made, ["date=1"])
    with pytest.raises(ValueError, match="NAME=VALUE"):
        values_of(made, ["data"])


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            {"run": "A", "beats": "B"},
            "a claim has the texts run, beats, metric, and may have source",
        ),
        ({"run": "A", "beats": "B", "metric": "test/x", "by": "me"}, "a claim has the texts"),
        ({"run": "A", "beats": 3, "metric": "test/x"}, "a claim has the texts"),
        ({"run": "A", "beats": "A", "metric": "test/x"}, "A cannot beat itself"),
        ({"run": "A", "beats": "BB", "metric": "test/x"}, "no run 'BB' is shown; choose of A, B"),
        ({"run": "A", "beats": "C", "metric": "test/x"}, "no run 'C' is shown; choose of A, B"),
        (
            {"run": "A", "beats": "B", "metric": "test/y"},
            "'test/y' is none of the metrics that say",
        ),
        ({"run": "A", "beats": "B", "metric": "test/z"}, "what is better; choose of test/x"),
    ],
)
def test_a_claim_is_about_what_is_in_the_tables(claim, message, tmp_path):
    said = {"runs": RUNS | {"C": {"shown": False}}, "metrics": {"test/x": "higher", "test/y": ""}}
    with pytest.raises(ValueError, match=message):
        read_experiment(written(tmp_path, **said, claims=[claim]))


@pytest.mark.parametrize("again", [{"source": "another"}, {"run": "B", "beats": "A"}])
def test_a_claim_that_one_test_decides_with_another_is_refused(again, tmp_path):
    claim = {"run": "A", "beats": "B", "metric": "test/x"}
    said = {"runs": RUNS, "metrics": {"test/x": "higher", "test/y": "higher"}}
    read_experiment(written(tmp_path, **said, claims=[claim, claim | {"metric": "test/y"}]))
    with pytest.raises(ValueError, match="A and B are compared twice in test/x, and p-values"):
        read_experiment(written(tmp_path, **said, claims=[claim, claim | again]))
