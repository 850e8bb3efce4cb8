"""Fixtures; everything a test writes stays under ``tmp_path``."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Generator
from pathlib import Path

# Read by huggingface_hub when it is imported: without it, a wrong name waits for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_kd.cli.main import main
from lightning_kd.data import arithmetic_tokenizer
from tests.support.quick import is_quick, mark_by_fixture, no_process_started
from tests.support.toys import letter_tokenizer, tiny_llama

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure() -> None:
    """Take signals that a shell ignores under nohup or in the background: some tests send them."""
    for number, handler in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before ``-m`` selects."""
    mark_by_fixture(items)


def pytest_collection_finish() -> None:
    """Spare the collector what is there to stay: ten thousand tests, and all that they import."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around fixtures of every scope, and in a run of all tests as well."""
    if not is_quick(item):
        return (yield)
    with no_process_started():
        return (yield)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no cache outside the test's own folder, a known seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter; ids 0 pad, 1 eos."""
    return letter_tokenizer()


@pytest.fixture
def shared_data() -> Path:
    """Real text beside the checkout."""
    if not DATA.exists():
        pytest.skip("the real text is not beside this checkout")
    return DATA


@pytest.fixture
def cli(monkeypatch):
    """Run ``lightning-kd`` with arguments; what it prints is captured by pytest."""

    # What Ctrl-C does to a process is pytest's own business.
    monkeypatch.setattr("lightning_kd.cli.preparation.end_together", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightning-kd", *map(str, arguments)])
        main()

    return run


@pytest.fixture
def fails(cli, capsys):
    """Run ``lightning-kd`` with arguments it must refuse; returns what it said."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli(*arguments)
        said = capsys.readouterr().err
        assert exit_.value.code == 2, said
        assert "Traceback" not in said
        return said[said.index("error:") :]

    return run


@pytest.fixture(scope="session")
def saved_teacher(tmp_path_factory):
    """A directory with a random teacher of the arithmetic task, for all tests to read."""
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    tiny_llama(1, vocab_size=14).save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(saved_teacher, tmp_path):
    """The teacher as a directory of one's own, which a test may change."""
    return shutil.copytree(saved_teacher, tmp_path / "teacher")
