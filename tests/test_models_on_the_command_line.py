"""Models by their names alone, one or several, where a configuration has others."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_kd.cli.models import is_model_name
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS

pytestmark = EXPECTED_WARNINGS


@pytest.fixture
def parsed(cli, capsys):
    """Return class name, start and members of each model that a command line comes to."""

    def models(config, *arguments):
        if not isinstance(config, Path):
            config = CONFIGS / f"{config}.yaml"
        with pytest.raises(SystemExit) as end:
            cli("fit", "--config", config, *arguments, "--print_config")
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        given = yaml.safe_load(said.out)["model"]["init_args"]
        return brief(given.get("student")), brief(given.get("teacher"))

    return models


def brief(model):
    if model is None:
        return None
    options = model.get("init_args", model)
    if "members" in options:
        return [brief(member) for member in options["members"]]
    name, config = options.get("name_or_path"), options.get("config")
    assert (name is None) != (config is None)
    return name or config


def overlay(teacher):
    Path("mine.yaml").write_text(json.dumps({"model": {"init_args": {"teacher": teacher}}}))
    return ["--config", "mine.yaml"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("gpt2", True),
        ("distilgpt2", True),
        ("Qwen2.5-0.5B", True),
        ("my_studnt", True),
        ("null", False),
        ("ServedTeacher", False),
        ("ServedTeachr", False),
        ("torch.nn.Module", False),
        ("own.MyTeacher", False),
        ("student.yaml", False),
    ],
)
def test_a_word_that_is_no_class_is_a_model(word, expected):
    assert is_model_name(word) == expected


def test_words_alone_as_options(parsed):
    given = ["--model.student", "gpt2", "--model.teacher=distilgpt2"]
    assert parsed("supervised_kd", *given) == ("gpt2", "distilgpt2")


def test_a_directory_is_one_of_where_the_command_is_typed(parsed):
    # A capitalised word that resembles a class is a model's where a directory has one.
    Path("MyTeacher").mkdir()
    Path("MyTeacher", "adapter_config.json").write_text("{}")
    Path("exp").mkdir()
    said = yaml.safe_load((CONFIGS / "supervised_kd.yaml").read_text())
    said["model"]["init_args"] |= {"student": "my_student", "teacher": "MyTeacher"}
    Path("exp/mine.yaml").write_text(json.dumps(said))
    assert parsed(Path("exp/mine.yaml")) == ("my_student", "MyTeacher")


def test_a_part_of_a_configuration_takes_the_place_of_a_saved_model(parsed):
    config = {"model_type": "gpt2"}
    given = [f"--model.{role}.config.model_type=gpt2" for role in ("student", "teacher")]
    assert parsed("minillm", *given) == (config, config)


@pytest.mark.parametrize(
    "given", [["--model.teacher", "one"], ["--model.teacher.name_or_path", "one"], "one"]
)
def test_one_teacher_in_the_place_of_several(given, parsed):
    given = overlay(given) if isinstance(given, str) else given
    assert parsed("baby_llama", *given)[1] == "one"


@pytest.mark.parametrize("config", ["baby_llama", "minillm"])
@pytest.mark.parametrize("given", [["--model.teacher", "[one, other]"], "overlay"])
def test_a_list_of_teachers(config, given, parsed):
    given = overlay(["one", "other"]) if given == "overlay" else given
    assert parsed(config, *given)[1] == ["one", "other"]


def test_members_by_their_names_and_one_after_the_list(parsed):
    given = ["--model.teacher.members", "[one, other]"]
    assert parsed("baby_llama", *given)[1] == ["one", "other"]
    assert parsed("baby_llama", *overlay(["one", "other"]), "--model.teacher", "last")[1] == "last"


def test_a_class_that_is_named_stays(fails):
    chosen = ["--model.teacher", "ServedTeacher", "--model.teacher.name_or_path", "one"]
    assert "name_or_path" in fails("fit", "--config", CONFIGS / "baby_llama.yaml", *chosen)
