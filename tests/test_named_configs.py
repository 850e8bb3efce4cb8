"""Configurations that come with the package have names in any folder; a file comes first."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_kd.__main__ import main
from lightning_kd.cli.named_configs import config_file, with_config_files
from tests.support.command_line import CONFIGS, QUIET, SMALL

NAMES = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_name(name):
    assert Path(config_file(name)).read_text() == (CONFIGS / f"{name}.yaml").read_text()


def test_a_file_comes_before_a_name_and_a_directory_does_not():
    Path("gkd").mkdir()
    assert Path(config_file("gkd")).samefile(CONFIGS / "gkd.yaml")
    Path("sft").write_text("seed_everything: 3")
    assert config_file("sft") == "sft"


@pytest.mark.parametrize("text", ["{seed_everything: 3}", "seed_everything: 3", "a:\n- b"])
def test_what_is_yaml_itself_is_left_to_the_parser(text):
    assert config_file(text) == text


@pytest.mark.parametrize(
    "given", ["gdk", "GKD", "a:gkd", "configs/gkd.yaml", "./configs/gkd.yaml", "gkd.yaml"]
)
def test_an_unknown_name_lists_the_names_and_the_nearest(given):
    with pytest.raises(ValueError, match="did you mean --config gkd") as error:
        config_file(given)
    assert f"there is no file {given}" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_all_spellings_of_the_option_and_nothing_else():
    sft, gkd, demo = (
        str((CONFIGS / f"{name}.yaml").resolve()) for name in ("sft", "gkd", "experiments/demo")
    )
    for typed, meant in (
        (["fit", "--config", "sft", "-c", "gkd"], ["fit", "--config", sft, "-c", gkd]),
        (["--config=sft", "fit"], [f"--config={sft}", "fit"]),
        (["compare", "--config", "experiments/demo"], ["compare", "--config", demo]),
        (
            ["compare", "--configs", "sft", "gkd", "--output", "sft"],
            ["compare", "--configs", sft, gkd, "--output", "sft"],
        ),
        (["fit", "--model.student", "sft", "gkd"], ["fit", "--model.student", "sft", "gkd"]),
        (["fit", "--config", "sft", "gkd"], ["fit", "--config", sft, "gkd"]),
    ):
        assert with_config_files(typed) == meant


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        (["fit", "--config", "experiments/demo"], "lightning-kd compare --config experiments/demo"),
        (["check", "-c=experiments/demo"], "lightning-kd compare --config experiments/demo"),
        (["compare", "--configs", "sft", "experiments/demo"], "compare --config experiments/demo"),
        (["compare", "--config", "gkd"], "lightning-kd fit --config gkd, or .*--configs gkd"),
    ],
)
def test_an_experiment_is_for_compare_and_one_run_is_not(typed, instead):
    with pytest.raises(ValueError, match=instead):
        with_config_files(typed)


def test_fit_by_name_is_fit_by_file(cli, capsys):
    printed = []
    for given in (["gkd", "overlays/ddp"], [CONFIGS / "gkd.yaml", CONFIGS / "overlays/ddp.yaml"]):
        with pytest.raises(SystemExit):
            cli("fit", "--config", given[0], "--config", given[1], "--print_config")
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0]["trainer"]["strategy"] == "ddp"


def test_the_config_of_a_run_by_name_makes_the_next_run(cli):
    small = [
        *QUIET,
        "--model.student.config",
        SMALL,
        "--data.train_size",
        16,
        "--data.batch_size",
        8,
    ]
    cli("fit", "--config", "sft", "--config", "overlays/debug", *small)
    cli("fit", "--config", "runs/version_0/config.yaml")
    first, second = (
        yaml.safe_load(Path(f"runs/version_{n}/config.yaml").read_text()) for n in (0, 1)
    )
    assert first == second
    assert "--config sft" in Path("runs/version_0/student/README.md").read_text()


@pytest.mark.parametrize(
    "command", ["fit", "check", "cache", "test", "predict", "export", "evaluate", "compare"]
)
def test_every_command_refuses_an_unknown_name(command, fails):
    said = fails(command, "--config", "gdk")
    assert "did you mean --config gkd?" in said
    assert "overlays/fsdp2" in said


def test_compare_knows_experiments_and_configs_by_name(fails):
    assert "--set data=..." in fails("compare", "--config", "experiments/stories")
    said = fails("compare", "--configs", "sft", "gkd", "--seeds", "0", "0")
    assert "--seeds 0 0" in said


def test_help_says_so_and_lists_the_names(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-kd", "--help"])
    main()
    said = capsys.readouterr().out
    assert "by the name of one that comes along" in said
    assert set(NAMES) <= set(said.replace(",", " ").split())
