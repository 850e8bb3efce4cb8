"""Help that has been shown once comes at once; never one of other versions, words or terminals."""

import subprocess
import sys

import pytest

from lightning_kd.cli.stored_help import show_help


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lightning_kd" / "help"


class Builder:
    """Prints another text each time, so that a text tells when it was built."""

    def __init__(self, code=0):
        self.times, self.code = 0, code

    def __call__(self):
        self.times += 1
        print(f"help {self.times}: lmbda \u03bb")
        raise SystemExit(self.code)


@pytest.mark.parametrize(
    "words",
    [["fit", "-h"], ["fit", "--help"], ["fit", "--model.help", "GKD"], ["fit", "--data.help=A"]],
)
def test_the_second_time_nothing_is_built(words, capsys):
    build = Builder()
    assert show_help(words, build)
    assert show_help(words, build)
    assert capsys.readouterr().out == "help 1: lmbda \u03bb\n" * 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fit"],
        ["fit", "--config", "a.yaml", "--help"],
        ["fit", "--model.help", "own.Method"],
        ["fit", "--help", "--trainer.max_steps", "3"],
    ],
)
def test_what_may_depend_on_files_is_left_to_the_command(words, cache):
    build = Builder()
    assert not show_help(words, build)
    assert build.times == 0
    assert not cache.exists()


def test_commands_and_classes_have_texts_of_their_own(capsys):
    build = Builder()
    for words in (["fit", "-h"], ["test", "-h"], ["fit", "--model.help", "GKD"]):
        show_help(words, build)
        assert capsys.readouterr().out.startswith(f"help {build.times}")
    assert build.times == 3


@pytest.mark.parametrize("change", ["width", "package", "colour"])
def test_another_terminal_or_version_builds_it_anew(change, capsys, monkeypatch, tmp_path, cache):
    build = Builder()
    monkeypatch.setenv("COLUMNS", "80")
    show_help(["fit", "-h"], build)
    if change == "width":
        monkeypatch.setenv("COLUMNS", "100")
    elif change == "colour":
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        metadata = tmp_path / "packages" / "other-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path / "packages")
    show_help(["fit", "-h"], build)
    assert build.times == 2
    assert len(list(cache.rglob("*.txt"))) == 1, "old texts are not kept"


def test_an_error_is_not_kept(cache):
    build = Builder(code=2)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            show_help(["fit", "--model.help", "GKDD"], build)
        assert end.value.code == 2
    assert build.times == 2
    assert not cache.exists()


def test_where_nothing_can_be_kept_it_is_built_each_time(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    build = Builder()
    for _ in range(2):
        assert show_help(["fit", "-h"], build)
    assert build.times == 2


@pytest.mark.command_line
@pytest.mark.processes
def test_the_stored_help_is_that_of_the_command():
    """It comes without importing torch, which takes seconds."""
    command = [sys.executable, "-m", "lightning_kd", "serve", "--help"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert "--limits" in first.stdout
    assert second.stdout == first.stdout
    code = (
        "import sys\nsys.argv[1:] = ['serve', '--help']\nfrom lightning_kd.__main__ import main\n"
    )
    code += "main()\nassert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    assert (
        "usage"
        in subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
