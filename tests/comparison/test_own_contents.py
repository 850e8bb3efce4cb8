"""Contents that make a run another: own modules wherever they are, what lies below --output."""

import json
import re
from pathlib import Path

import pytest

from lightning_kd.comparison.experiment import Layer, Variant
from lightning_kd.imports import OwnModules
from tests.comparison.test_records import OF_SFT, OUT, experiment, made, texts

__all__ = ["texts"]  # a fixture


def with_options(**options):
    return experiment(variants=[Variant("SFT", Layer(options=options), "SFT")])


def check_another(said, file, named, place="out/SFT/0", content="b = 2"):
    """Make the runs, and check that other contents of a file make one another."""
    made(said)
    assert made(said)[0] == []
    Path(file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"({place}): the contents of {named}")):
        made(said)


def test_a_module_that_only_a_value_names_is_read():
    Path("own3.py").write_text("a = 1")
    check_another(with_options(metrics=["own3.score"]), "own3.py", "own3.py")


def test_a_module_on_the_path_is_read(monkeypatch):
    Path("lab").mkdir()
    monkeypatch.syspath_prepend("lab")
    Path("lab/own4.py").write_text("a = 1")
    check_another(with_options(metrics=["own4.score"]), "lab/own4.py", "own4.py")


def test_a_module_that_an_own_one_imports_is_read(monkeypatch):
    Path("own5.py").write_text("import json\nfrom own6.part import number\n")
    Path("own6").mkdir()
    Path("own6/__init__.py").write_text("")
    Path("own6/part.py").write_text("def f():\n    import own7\n")
    Path("own7.py").write_text("a = 1")
    check_another(with_options(metrics=["own5.score"]), "own7.py", "own7.py")
    Path("own6/part.py").write_text("import own7")
    with pytest.raises(ValueError, match=r"the contents of own7\.py, package own6"):
        made(with_options(metrics=["own5.score"]))


def test_installed_packages_and_pythons_own_are_not_read():
    names = ["torch", "json", "sys", "yaml", "lightning", "no_such_module"]
    assert OwnModules([str(Path.cwd())], frozenset()).files(names) == {}


def test_data_below_the_output_are_read():
    OUT.mkdir()
    Path("out/more.jsonl").write_text("one")
    check_another(with_options(data={"more": "out/more.jsonl"}), "out/more.jsonl", "out/more.jsonl")


def test_what_a_comparison_writes_beside_its_runs_is_no_data():
    OUT.mkdir()
    Path("out/more.jsonl").write_text("one")
    said = with_options(data={"more": "out"})
    made(said)
    for name in ("compare.lock", "report.json", "report.md", "curves.png", "bars.png"):
        (OUT / name).write_text("another")
    assert made(said)[0] == []
    check_another(said, "out/more.jsonl", "out")


def test_a_tokenizer_below_the_output_is_read_and_the_output_may_be_moved():
    place = Path("out/tokenizers/bpe-1")
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_text("one")
    said = with_options(data={"tokenizer": str(place)})
    check_another(said, place / "tokenizer.json", str(place))
    kept = json.loads(Path("out/SFT/0/given.json").read_text())["contents"]["fit"]
    assert "{output}/tokenizers/bpe-1" in kept


def of_a_start():
    return experiment(variants=[Variant("SFT", Layer(), "SFT"), Variant("KD", OF_SFT, "KD")])


def test_a_run_whose_start_was_made_anew_with_other_weights_is_another():
    said, start = of_a_start(), OUT / "SFT" / "0"
    made(said)
    start.rename("gone")
    commands, (_, kd) = made(said, weights="others")
    assert commands == ["fit SFT/0", "test SFT/0"]
    assert kd.error.startswith("the contents of out/SFT/0/student changed meanwhile; --rerun")
    with pytest.raises(ValueError, match=r"\(out/KD/0\): the contents of out/SFT/0/student"):
        made(said)
    assert made(said, rerun=True)[0] == ["fit KD/0", "test KD/0"]


def test_a_start_that_comes_to_the_same_weights_makes_no_run_another():
    said, start = of_a_start(), OUT / "SFT" / "0"
    made(said)
    start.rename("gone")
    assert made(said)[1][1].error == ""
    assert made(said)[0] == []


def test_a_run_says_of_which_code_its_start_is(monkeypatch):
    said = of_a_start()
    monkeypatch.setattr("lightning_kd.comparison.records.sources", lambda: "1" * 16)
    made(experiment())
    monkeypatch.setattr("lightning_kd.comparison.records.sources", lambda: "2" * 16)
    _, (_, kd) = made(said)
    assert kd.result["sources"] == f"{'1' * 16}, {'2' * 16}"
