"""Slips in a class of one's own are named, on the command line, before anything is trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kd.cli.class_choices import classes_to_choose
from lightning_kd.cli.messages import is_for_the_user, shorten
from lightning_kd.divergences import ForwardKL, make_divergence
from lightning_kd.fused import DivergenceTerm, LogitsChunk, TeacherCrossEntropy
from lightning_kd.imports import why_no_class
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, fit

pytestmark = EXPECTED_WARNINGS

SLIPS = """
import torch
from lightning_kd import Divergence, Engine, Teacher, TeacherModule
from lightning_kd.fused import CrossEntropy, DivergenceTerm, TokenTerm
from lightning_kd.modules import LossTerm

class Plain: pass
class NoValue(Divergence): pass
class NoSize(Teacher):
    answers = frozenset({"top_k"})
    def answer(self, batch, positions, *, kind, logits_backend): ...
class NoGenerate(Engine): pass
class Scaled(Divergence):
    def __init__(self, scale):
        self.scale = scale
    def value(self, student_log_probs, teacher_log_probs):
        return self.scale * (student_log_probs - teacher_log_probs).square().sum(-1)
class Method(TeacherModule):
    terms = ("divergence",)
    def loss_terms(self, batch, scores):
        return {"divergence": LossTerm(DivergenceTerm("forward_kl"))}
class NoLoss(TeacherModule):
    terms = ("divergence",)
class NoTerms(TeacherModule):
    def loss_terms(self, batch, scores):
        return {"divergence": LossTerm(DivergenceTerm("forward_kl"))}
class OneWord(Method):
    terms = "divergence"
class Forgets(Method):
    def loss_terms(self, batch, scores):
        {"divergence": LossTerm(DivergenceTerm("forward_kl"))}
class OneTensor(Method):
    def loss_terms(self, batch, scores):
        return torch.ones(())
class Bare(Method):
    def loss_terms(self, batch, scores):
        return {"divergence": DivergenceTerm("forward_kl")}
class Name(Method):
    def loss_terms(self, batch, scores):
        return {"divergence": LossTerm("forward_kl")}
class TextWeight(Method):
    def loss_terms(self, batch, scores):
        return {"divergence": LossTerm(DivergenceTerm("forward_kl"), "0.5")}
class Needs(Method):
    def __init__(self, bonus, **base):
        super().__init__(**base)
class OwnStep(Method):
    def training_step(self, batch, batch_idx):
        return self.student(input_ids=batch["input_ids"]).logits.square().mean()
class Gap(TokenTerm):
    def values(self, chunk):
        return (chunk.teacher() - chunk.student()).square().sum(-1)
class AsksNot(Method):
    def loss_terms(self, batch, scores):
        return {"divergence": LossTerm(Gap())}
"""
KD = ["--model.teacher.name_or_path", "teacher"]
QUOTES = "needs quotes"


@pytest.fixture
def slips(tmp_path, monkeypatch, teacher):
    """The classes, where they can be imported; the teacher stands beside them."""
    (tmp_path / "own_slips.py").write_text(SLIPS)
    monkeypatch.syspath_prepend(str(tmp_path))


METHODS = {
    "NoLoss": "NoLoss does not define loss_terms",
    "NoTerms": "NoTerms.terms is None; give a tuple",
    "OneWord": "OneWord.terms is 'divergence'; give a tuple",
    "Forgets": "the loss of Forgets is None (is a return missing?)",
    "OneTensor": "the loss of OneTensor is a Tensor; loss_terms returns a mapping",
    "Bare": "the term divergence of Bare is a DivergenceTerm; return LossTerm(",
    "Name": "the term divergence of Name holds a str; give LossTerm a TokenTerm",
    "TextWeight": "the term divergence of TextWeight has the coefficient '0.5'; give a number",
    "Needs": "own_slips.Needs needs bonus, which has no default",
    "OwnStep": "super().training_step(batch, batch_idx)",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("slips")
def test_a_slip_in_a_method_is_named(fails, method):
    said = fails(*fit("sft", "--model", f"own_slips.{method}", *KD))
    assert METHODS[method] in said
    assert QUOTES not in said


@pytest.mark.usefixtures("slips")
def test_a_term_that_reads_the_teacher_has_to_ask_for_it(fails):
    quiet = ["--trainer.log_every_n_steps", 50]  # no metric asks the teacher either
    said = fails(*fit("sft", "--model", "own_slips.AsksNot", *KD, *quiet))
    assert "set needs_teacher = True in its class" in said


@pytest.mark.parametrize(
    ("option", "path", "reason"),
    [
        ("model.divergence", "own_slips.Scaled", "own_slips.Scaled needs scale"),
        ("model.divergence", "own_slips.NoValue", "own_slips.NoValue does not define value"),
        ("model.divergence", "own_slips.Plain", "not a class that derives from Divergence"),
        ("model.divergence", "own_slips.Scale", "has no Scale; did you mean Scaled?"),
        ("model.divergence", "no_lab.x.Y", "there is no module no_lab; a package of your own"),
        ("model.teacher", "own_slips.NoSize", "own_slips.NoSize does not define vocabulary_size"),
        ("model.teacher", "own_slips.Plain", "not a class that derives from Teacher"),
        ("model.teacher", "no_lab.x.Y", "there is no module no_lab; a package of your own"),
        ("model.engine", "own_slips.NoGenerate", "own_slips.NoGenerate does not define generate"),
        ("model.engine", "own_slips.Nothing", "own_slips has no Nothing"),
        ("model", "own_slips.Plain", "not a class that derives from LightningModule"),
        ("model", "own_slips.no.Method", "there is no module own_slips.no"),
    ],
)
@pytest.mark.usefixtures("slips")
def test_a_class_that_cannot_be_used_is_named_with_the_reason(fails, option, path, reason):
    said = fails(*fit("supervised_kd", *KD, f"--{option}", path))
    assert reason in said
    assert not {"Parser key", "accessible", "Expected an"} & set(said.split(" "))


def test_a_package_in_no_searched_directory_comes_with_the_ways_to_have_it_found():
    Path("lab_nowhere.py").write_text("from lightning_kd import Divergence\n")
    assert "PYTHONPATH=." in why_no_class("lab_nowhere.ForwardKL", "Divergence")
    assert why_no_class("lightning_kd.divergences.ForwardKL", "Divergence") == ""


def test_a_module_that_raises_is_said_to_raise(tmp_path, monkeypatch):
    Path("raises_at_import.py").write_text("1 / 0\n")
    Path("lacks_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "ZeroDivisionError" in why_no_class("raises_at_import.X", "Divergence")
    lacks = why_no_class("lacks_package.X", "Divergence")
    assert lacks == "cannot import lacks_package: No module named 'no_such_package'"


LOCAL = {"name_or_path": "teacher"}


@pytest.mark.parametrize(
    ("name", "members", "more", "expected"),
    [
        ("TeacherEnsemble", [LOCAL, LOCAL], {"weights": [1, 1, 1]}, "3 weights came for 2 members"),
        ("TeacherEnsemble", ["no_directory"], {}, "cannot load the model 'no_directory'"),
        ("TeacherEnsemble", {"a": LOCAL}, {}, "[{name_or_path: runs/a}, {name_or_path: runs/b}]"),
        ("RoutedTeacher", [LOCAL], {}, "{math: {name_or_path: runs/a}, ...}"),
        ("RoutedTeacher", {}, {}, "RoutedTeacher needs at least one member"),
    ],
)
@pytest.mark.usefixtures("slips")
def test_members_of_a_teacher_are_refused_with_the_right_form(fails, name, members, more, expected):
    spec = {"class_path": name, "init_args": {"members": members, **more}}
    Path("t.yaml").write_text(json.dumps({"model": {"init_args": {"teacher": spec}}}))
    said = fails(*fit("supervised_kd", "--config", "t.yaml"))
    assert expected in said
    assert "does not correspond" not in said


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model.divergence.beta", "0.1", "the class that is chosen there has no options"),
        ("--model.alpha", "half", "--model.alpha:"),
        ("--model.lr", "1e-4", "did you mean --model.optimizer.lr?"),
        ("--learning_rate", "1e-4", "did you mean --model.optimizer.lr?"),
        ("--model.lmbda", "1", "did you mean --on_policy.lmbda?"),
        ("--model.student.name_or_path", "start", "--model.student.config null"),
    ],
)
@pytest.mark.usefixtures("slips")
def test_a_wrong_option_comes_with_the_right_one(fails, option, value, expected):
    said = fails(*fit("supervised_kd", *KD, option, value))
    assert expected in said
    assert not said.rstrip().endswith("choices are")


def test_the_commands_of_the_shell_are_no_choice(fails):
    assert "print_shtab" not in fails(*fit("supervised_kd", *KD, "--model.no", "1"))


def test_a_saved_student_takes_the_place_of_a_configuration(cli, capsys):
    config = ["fit", "--config", CONFIGS / "supervised_kd.yaml", "--print_config"]
    for null in (["--model.student.config", "null"], ["--model.student.config=null"]):
        with pytest.raises(SystemExit):
            cli(*config, "--model.student.name_or_path", "start", *null)
        student = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["student"]
        student = student.get("init_args", student)
        assert (student["name_or_path"], student["config"]) == ("start", None)


def test_one_text_is_no_list_of_columns(fails):
    data = ["--data", "PromptCompletionData", "--data.tokenizer", "x"]
    assert """'["topic"]'""" in fails(*fit("sft", *data, "--data.extra_columns", "topic"))


def test_help_names_the_checkpoints_of_this_library_and_the_help_of_a_class(cli, capsys):
    for command, expected in (
        (["fit", "--help"], "last or best, of the run whose config.yaml is given"),
        (["--help"], "--model.help GKD"),
    ):
        with pytest.raises(SystemExit):
            cli(*command)
        printed = " ".join(capsys.readouterr().out.split())
        assert expected in printed
        assert "hpc" not in printed.partition("--ckpt_path")[2][:400]


def test_a_term_takes_a_divergence_by_its_name():
    assert isinstance(DivergenceTerm("forward_kl").divergence, ForwardKL)
    for wrong in (ForwardKL, None, 0.5):
        with pytest.raises(ValueError, match="give a name or an instance"):
            make_divergence(wrong)


def test_a_chunk_without_teacher_says_what_the_term_lacks():
    chunk = LogitsChunk(slice(0, 1), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="needs_teacher = True"):
        TeacherCrossEntropy().values(chunk)


@pytest.mark.parametrize(
    "message",
    ["argument of type 'NoneType' is not iterable", "Errors: 3 of 4 rows", "the Subtypes: are odd"],
)
def test_no_message_of_ones_own_is_taken_for_the_parsers(message):
    assert shorten(message) == message
    assert classes_to_choose(message) == []


def test_what_python_raises_by_itself_is_no_message_for_the_user():
    with pytest.raises(AttributeError) as raised:
        DivergenceTerm("forward_kl").values(None)
    assert not is_for_the_user(raised.value)
