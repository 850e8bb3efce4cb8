"""What is installed is what is here: nothing left out, nothing at the top level but one name."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tracked files, as a release is."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        here, there = ROOT / name, source / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():
            there.symlink_to(here.readlink())
        elif here.exists():
            there.write_bytes(here.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", built, source],
        check=True,
        capture_output=True,
    )
    (path,) = built.glob("*.whl")
    return path


def test_every_package_is_listed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=["lightning_kd*"])
    assert sorted(declared["packages"]) == sorted({*found, "lightning_kd.callbacks"})


def test_callbacks_stand_at_the_top_and_are_linked():
    link = ROOT / "lightning_kd" / "callbacks"
    assert link.is_symlink()
    assert str(link.readlink()) == "../callbacks"
    assert (ROOT / "callbacks" / "__init__.py").is_file()


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
        f"lightning_kd/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert "lightning_kd/py.typed" in names


def test_the_wheel_works_from_an_empty_directory(wheel, tmp_path):
    """Unpacked and alone on the path, with the dependencies of this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import lightning_kd, lightning_kd.callbacks as c, pathlib, sys;"
        "home = pathlib.Path(sys.argv[1]).resolve();"
        "assert home in pathlib.Path(c.__file__).resolve().parents, c.__file__;"
        "assert home in pathlib.Path(lightning_kd.__file__).resolve().parents;"
        "import importlib.util; assert importlib.util.find_spec('callbacks') is None"
    )
    (tmp_path / "empty").mkdir()
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "site"],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        check=True,
    )


@pytest.mark.processes
def test_the_editable_install_works_from_an_empty_directory(tmp_path):
    program = (
        "import lightning_kd.callbacks as c, importlib.util;"
        "assert c.HFExport; assert importlib.util.find_spec('callbacks') is None"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
