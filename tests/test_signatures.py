"""Constructors say every option they take: its name, its type and its default."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from jsonargparse import ArgumentParser

import lightning_kd
from lightning_kd import callbacks, data, modules, teachers

ROOT = Path(__file__).resolve().parents[1]
OTHER_THAN_IN_THE_BASE = {
    ("ArithmeticData", "tokenizer"),  # the task has one of its own
    ("BabyLlama", "temperature"),  # of its paper
    ("RLDistillation", "normalization"),  # its objective is a mean over completions
}
"""Options that a class knows better than its base what to default to."""
SETTLED = {("BabyLlama", name) for name in ("divergence", "interpolation", "position_share")}
"""Options of a base that a class has made up its mind about."""


def own_constructor(cls):
    """Is the constructor of a class, inherited or not, the library's?"""
    return getattr(cls.__init__, "__module__", "").startswith("lightning_kd")


def bases(cls):
    """The classes above one whose constructors are the library's, the nearest first."""
    found = [c for c in cls.__mro__[1:] if "__init__" in vars(c) and own_constructor(c)]
    # A second branch of bases, that of a teacher among others, is not called through super().
    return [base for base in found if base is found[0] or issubclass(found[0], base)]


def options(cls):
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p for name, p in parameters.items() if name != "self"}


PUBLIC = sorted(
    {
        value
        for package in (lightning_kd, data, callbacks, teachers, modules)
        for value in (getattr(package, name) for name in package.__all__)
        if inspect.isclass(value) and own_constructor(value)
    },
    key=lambda cls: cls.__qualname__,
)
ABOVE = {base for cls in PUBLIC for base in bases(cls)}
CLASSES = sorted({*PUBLIC, *ABOVE}, key=lambda cls: cls.__qualname__)
# A data class inherits its fields as they are, and its presets are there to change the defaults.
DERIVED = [
    cls
    for cls in CLASSES
    if "__init__" in vars(cls) and bases(cls) and not dataclasses.is_dataclass(cls)
]
CONFIGURED = [cls for cls in PUBLIC if issubclass(cls, L.LightningModule | L.LightningDataModule)]


def name_of(cls):
    return cls.__qualname__


def test_what_is_looked_at():
    names = {cls.__name__ for cls in DERIVED}
    assert {"GKD", "MiniLLM", "PackedTextData", "ChatData", "StudentSpec", "LocalTeacher"} <= names
    assert {"ScaledSumModule", "TextData", "PlainTextData"} <= {cls.__name__ for cls in ABOVE}
    assert len(CONFIGURED) > 12


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_every_option_is_written_out_with_its_type(cls):
    hints = typing.get_type_hints(cls.__init__)
    for name, parameter in options(cls).items():
        assert parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}, name
        assert hints.get(name, typing.Any) is not typing.Any, name


@pytest.mark.parametrize("cls", DERIVED, ids=name_of)
def test_an_inherited_option_is_what_it_is_in_the_base(cls):
    own, hints = options(cls), typing.get_type_hints(cls.__init__)
    for base in bases(cls):
        its_hints = typing.get_type_hints(base.__init__)
        for name in options(base).keys() & own.keys():
            same = own[name].default == options(base)[name].default
            same &= hints[name] == its_hints[name]
            among = {(c.__name__, name) for c in cls.__mro__[: cls.__mro__.index(base)]}
            assert same or among & OTHER_THAN_IN_THE_BASE, f"{name} of {base.__name__}"


@pytest.mark.parametrize("cls", DERIVED, ids=name_of)
def test_every_option_of_the_base_is_passed_on(cls, monkeypatch):
    base = bases(cls)[0]
    constructor, received = inspect.signature(base.__init__), {}

    class ReachedError(Exception):
        pass

    def record(*args, **kwargs):
        received.update(constructor.bind(*args, **kwargs).arguments)
        raise ReachedError

    given = {name: SimpleNamespace(name=name) for name in options(cls)}
    instance = object.__new__(type("Concrete", (cls,), {}))
    monkeypatch.setattr(base, "__init__", record)
    with pytest.raises(ReachedError):
        cls.__init__(instance, **given)
    for name in constructor.parameters.keys() - {"self"}:
        if (cls.__name__, name) in SETTLED:
            assert name in received
            assert name not in given
        else:
            assert received[name] is given[name], name


def test_no_exception_is_out_of_date():
    by_name = {cls.__name__: cls for cls in DERIVED}
    for cls, name in OTHER_THAN_IN_THE_BASE:
        own, above = by_name[cls], bases(by_name[cls])[0]
        pair = [(options(c)[name].default, options(c)[name].annotation) for c in (own, above)]
        assert pair[0] != pair[1]


@pytest.mark.parametrize("cls", CONFIGURED, ids=name_of)
def test_help_describes_inherited_options_too(cls):
    parser = ArgumentParser()
    added = parser.add_class_arguments(cls, "it", fail_untyped=True)
    assert {name.split(".")[1] for name in added} == options(cls).keys()
    described = {action.dest: action.help for action in parser._actions}
    for name in added:
        assert described[name], name


CALLS = """
from lightning_kd import GKD, ArithmeticData, DistillationData, LocalTeacher, StudentSpec, SupervisedKD
from lightning_kd import DeepSpeedStrategy, FusedLogits, LoRA, PackedTextData
from lightning_kd.data import Rows
from transformers import PreTrainedModel

model: PreTrainedModel


class Listed(DistillationData):
    def rows(self, split: str) -> Rows | None:
        return None


student, teacher = StudentSpec("student", dtype="bfloat16"), LocalTeacher("teacher", revision="main")
GKD(student=student, teacher=teacher, divergence="forward_kl", logits_backend=FusedLogits())
SupervisedKD(student=student, teacher=teacher, alpha=0.3, normalization="sequence", tokenizer="one")
Listed(tokenizer="one", batch_size=4)
ArithmeticData(digits=2, eval_batch_size=4)
PackedTextData(tokenizer="one", train="texts.txt", add_eos=False)
DeepSpeedStrategy(stage=2)
StudentSpec.of(model, lora=LoRA(r=2))
LocalTeacher.of(model, placement="sharded")
GKD(student=student, teacher=teacher, normalisation="token")  # call-arg
GKD(student=student, teacher=teacher, normalization=3)  # arg-type
GKD(student=student)  # call-arg
SupervisedKD(student=student, teacher=teacher, temperatur=2.0)  # call-arg
SupervisedKD(student=student, teacher=teacher, vocabulary="same")  # arg-type
Listed(tokenizer="one", batchsize=4)  # call-arg
Listed(tokenizer="one", batch_size="4")  # arg-type
ArithmeticData(digits=2, worker_timeout=None)  # arg-type
PackedTextData(tokenizer="one", trian="texts.txt")  # call-arg
StudentSpec("student", dtype="bf16")  # arg-type
LocalTeacher("teacher", max_position=8)  # call-arg
DeepSpeedStrategy(stages=2)  # call-arg
StudentSpec.of(model, gradient_checkpoints=True)  # call-arg
LocalTeacher.of(model, placement=0)  # arg-type
"""


@pytest.mark.processes
def test_a_wrong_option_is_an_error_of_the_type_checker(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    cache = ROOT / ".mypy_cache"
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "calls.py"],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^calls\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.M)
    marked = [(n, re.search(r"  # (.*)$", line)) for n, line in enumerate(CALLS.splitlines(), 1)]
    assert set(found) == {(str(n), mark[1]) for n, mark in marked if mark}, (
        done.stdout + done.stderr
    )
