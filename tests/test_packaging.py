"""What is installed is what is here: nothing left out, nothing at the top level but one name."""

import email
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from setuptools import find_packages
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_kd
from tests.support.command_line import SMALL

ROOT = Path(__file__).resolve().parents[1]


SAVING = json.dumps(
    [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}}]
)
LINKS = {"lightning_kd/callbacks", "lightning_kd/configs"}
"""A source distribution has no links to directories; what they lead to is mapped by package-dir."""


def tracked():
    """The files of the repository, as git lists them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Source distribution of a copy of the tracked files, and the wheel that is built from it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked():
        here, there = ROOT / name, source / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():
            there.symlink_to(here.readlink())
        else:
            there.write_bytes(here.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", built, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(distributions):
    return distributions[1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The directory of a wheel that is unpacked, and nothing else of this repository."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def command(installed, *words, cwd, status=0):
    """Run the installed ``lightning-kd`` in a directory, and return what it printed."""
    cwd.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_kd", *map(str, words)],
        cwd=cwd,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_package_is_listed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=["lightning_kd*"])
    linked = {name.replace("/", ".") for name in LINKS}
    assert sorted(declared["packages"]) == sorted({*found, *linked})


@pytest.mark.parametrize("name", ["callbacks", "configs"])
def test_what_stands_at_the_top_is_linked(name):
    link = ROOT / "lightning_kd" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (ROOT / name).is_dir()


def test_a_source_distribution_holds_all_that_is_tracked_and_nothing_else(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    made = {"PKG-INFO", "setup.cfg"} | {n for n in names if n.startswith("lightning_kd.egg-info/")}
    assert {*tracked()} - names == LINKS
    assert names - {*tracked()} == made


def test_an_index_takes_both_with_their_description(distributions):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *distributions],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_its_metadata_are_those_of_the_package_and_its_readme(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Version"] == lightning_kd.__version__
    assert metadata["Author"] == "lightning_kd developers"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_the_wheel_holds_one_top_level_name_and_every_module(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    (top,) = [name for name in names if name.endswith("top_level.txt")]
    assert zipfile.ZipFile(wheel).read(top).split() == [b"lightning_kd"]
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lightning_kd").rglob("*.py")
        if "callbacks" not in path.parts
    }
    modules |= {
        f"lightning_kd/{path.relative_to(ROOT)}"
        for folder in ("callbacks", "configs")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    configs = {
        f"lightning_kd/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert {name for name in names if name.endswith(".yaml")} == configs
    assert "lightning_kd/py.typed" in names


def test_the_wheel_works_from_an_empty_directory(installed, tmp_path):
    """Unpacked and alone on the path, with the dependencies of this environment."""
    program = (
        "import lightning_kd, lightning_kd.callbacks as c, pathlib, sys;"
        "home = pathlib.Path(sys.argv[1]).resolve();"
        "assert home in pathlib.Path(c.__file__).resolve().parents, c.__file__;"
        "assert home in pathlib.Path(lightning_kd.__file__).resolve().parents;"
        "import importlib.util; assert importlib.util.find_spec('callbacks') is None"
    )
    (tmp_path / "empty").mkdir()
    subprocess.run(
        [sys.executable, "-c", program, installed],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        check=True,
    )


@pytest.mark.slow
def test_a_config_by_its_name_trains_exports_and_loads_from_the_wheel_alone(
    installed, teacher, tmp_path
):
    """On a reader's own rows and models, in a directory that has nothing of the repository."""
    empty = tmp_path / "empty"
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tokenizer)
    row = json.dumps({"prompt": "12+30=", "completion": "42"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 8)
    words = [
        "fit",
        "--config",
        "gkd",
        "--config",
        "overlays/debug",
        "--model.student.config",
        SMALL,
    ]
    words += ["--model.teacher", teacher, "--data", "PromptCompletionData"]
    words += ["--data.tokenizer", tokenizer, "--data.train", tmp_path / "train.jsonl"]
    words += ["--data.batch_size", 4, "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.callbacks", SAVING]
    words += ["--trainer.enable_checkpointing", "true", "--trainer.limit_val_batches", 0]
    command(installed, *words, cwd=empty)
    run = empty / "runs" / "version_0"
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["on_policy"]["init_args"]["lmbda"] == 0.5
    )
    command(
        *(installed, "export", "--ckpt_path", run / "checkpoints" / "last.ckpt"),
        *("--export.dirpath", "exported", "--trainer.accelerator", "cpu"),
        cwd=empty,
    )
    for student in (run / "student", empty / "exported"):
        assert "--config gkd" in (student / "README.md").read_text()
        model = AutoModelForCausalLM.from_pretrained(student)
        assert model.config.hidden_size == 16
        assert torch.isfinite(model(torch.tensor([[2, 3, 4]])).logits).all()
    weights = [load_file(s / "model.safetensors") for s in (run / "student", empty / "exported")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_an_experiment_by_its_name_is_found_with_its_own_module_in_the_wheel(installed, tmp_path):
    """The run with a class of that module is read as the others are; rows to train on are not there."""
    words = ["compare", "--config", "experiments/normalization", "--quick", "--set", "data=nowhere"]
    said = command(installed, *words, cwd=tmp_path, status=1)
    assert "nowhere" in said
    assert "the peer's divisor, seed 0: not started" in said


@pytest.mark.processes
def test_the_editable_install_works_from_an_empty_directory(tmp_path):
    program = (
        "import lightning_kd.callbacks as c, importlib.util;"
        "assert c.HFExport; assert importlib.util.find_spec('callbacks') is None"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
