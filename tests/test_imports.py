"""Modules of one's own: found beside a config and in the working directory, hiding nothing."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from lightning_kd.imports import OwnModules


@pytest.fixture(autouse=True)
def finders(monkeypatch):
    """Finders and modules as they were before."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def module(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f"VALUE = {value!r}\n")


def install(*arguments):
    return list(filter(None, OwnModules.of_arguments(arguments).install()))


def test_a_module_is_found_beside_a_config_before_the_working_directory():
    module("lab/first_own.py", "beside")
    module("first_own.py", "here")
    module("second_own.py", "here")
    Path("lab/own.yaml").write_text("a: first_own.A\nb: [second_own.sub.B]\n")
    assert install("fit", "--config", "lab/own.yaml") == []
    assert import_module("first_own").VALUE == "beside"
    assert import_module("second_own").VALUE == "here"


def test_the_last_config_is_the_first_to_be_looked_beside():
    for name in ("a", "b"):
        module(f"{name}/third_own.py", name)
        Path(f"{name}/own.yaml").write_text("")
    install("--config=a/own.yaml", "--config", "b/own.yaml", "--model=third_own.A")
    assert import_module("third_own").VALUE == "b"


def test_nothing_is_found_that_the_command_does_not_name():
    module("unnamed_own.py", 1)
    Path(
        "empty_own"
    ).mkdir()  # which Python would take for a package, as the folder wandb of its runs
    install("--model", "my_own.A")
    for name in ("unnamed_own", "empty_own"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_a_package_is_found_with_what_is_in_it():
    module("lab_own/inner/deep.py", 3)
    install("--model", "lab_own.inner.deep.A")
    assert import_module("lab_own.inner.deep").VALUE == 3


def test_an_installed_module_is_taken_and_that_is_said():
    module("colorsys.py", "mine")
    (said,) = install("--model", "colorsys.A")
    assert "colorsys is the installed module" in said
    assert f"{Path.cwd() / 'colorsys.py'} is not read; rename" in said
    assert not hasattr(import_module("colorsys"), "VALUE")


def test_another_command_forgets_the_modules_of_the_one_before():
    module("lab/fourth_own.py", 4)
    Path("lab/own.yaml").write_text("a: fourth_own.A")
    install("--config", "lab/own.yaml")
    install("--model", "fourth_own.A")
    with pytest.raises(ModuleNotFoundError):
        import_module("fourth_own")
