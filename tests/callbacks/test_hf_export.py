"""Exported weights, their directory, and models that are never replaced."""

import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoModelForCausalLM

from lightning_kd import filesystem
from lightning_kd.callbacks import HFExport
from lightning_kd.callbacks.export import directory
from lightning_kd.callbacks.export.card import CardContext
from lightning_kd.callbacks.export.directory import write_directory
from lightning_kd.callbacks.export.training_record import TrainingRecord
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.modules import SFT, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

pytestmark = EXPECTED_WARNINGS

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
IDS = torch.arange(2, 12)[None]


def saved(name, seed=1):
    tiny_llama(seed).save_pretrained(name)
    letter_tokenizer().save_pretrained(name)
    return name


def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory)(IDS).logits


def sft(student=None, **options):
    return SFT(
        student=student or StudentSpec.of(tiny_llama(0)),
        optimizer=lambda groups: torch.optim.SGD(groups, **{"lr": 0.1, **options}),
    )


def fit(module, *callbacks, steps=2, ckpt_path=None, **options):
    fitted = trainer(max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **options)
    data = BatchList([BATCH] * steps, evaluate=[BATCH] * steps)
    fitted.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return fitted


def files(folder="."):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


class Steps(ModelCheckpoint):
    """Counter of started steps."""

    begun = 0

    def on_train_batch_start(self, *_):
        self.begun += 1


def refused(module, export, message, *callbacks, **options):
    """Check that no step is taken and no file changes."""
    before, steps = files(), Steps(save_top_k=0)
    with pytest.raises(ValueError, match=message):
        fit(module, export, steps, *callbacks, enable_checkpointing=True, **options)
    assert steps.begun == 0
    assert files() == before


def test_another_model_is_replaced_only_with_overwrite():
    saved("other")
    refused(sft(), HFExport("other"), "model in .*other already.*export.overwrite: true")
    module = sft()
    fit(module, HFExport("other", overwrite=True))
    assert torch.equal(logits("other"), module.student.eval()(IDS).logits)
    assert not [path.name for path in Path().iterdir() if path.name.startswith("other.")]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", ["./teacher", "link", "student", "tokenizer"])
def test_a_model_that_the_run_reads_is_never_replaced(path, overwrite):
    for name in ("teacher", "student", "tokenizer"):
        saved(name)
    Path("link").symlink_to("teacher")
    module = SupervisedKD(
        student=StudentSpec("student"), teacher=LocalTeacher("teacher"), tokenizer="tokenizer"
    )
    what = "teacher" if path == "link" else Path(path).name
    refused(module, HFExport(path, overwrite=overwrite), f"is the {what} of this run")


def test_the_directory_of_a_loaded_model_is_not_replaced():
    module = sft(StudentSpec.of(AutoModelForCausalLM.from_pretrained(saved("student"))))
    refused(module, HFExport("student", overwrite=True), "is the student of this run")


def test_an_unwritable_directory_is_rejected_before_the_first_step():
    Path("file").write_text("text")
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("text")
    saved("model/checkpoint-1")
    saved("model")
    refused(sft(), HFExport("file"), "there is a file of that name")
    refused(sft(), HFExport("file/student"), "could not be written to .*file/student")
    refused(sft(), HFExport("/proc/student"), "could not be written to /proc/student")
    refused(sft(), HFExport("a" * 252), "File name too long")
    refused(sft(), HFExport("folder", overwrite=True), "it also has notes.txt")
    refused(sft(), HFExport("model", overwrite=True), "it also has checkpoint-1")


def test_a_directory_that_runs_share_keeps_the_first_ones_model():
    for logger in (TensorBoardLogger("runs", name="", version=0, default_hp_metric=False), False):
        module = sft()
        fit(module, HFExport(), logger=logger)
        student = "runs/version_0/student" if logger else "student"
        before = logits(student)
        assert torch.equal(before, module.student.eval()(IDS).logits)
        refused(sft(lr=0.2), HFExport(), "there is a model in .*student already", logger=logger)
        assert torch.equal(logits(student), before)
        fit(sft(lr=0.2), HFExport(overwrite=True), logger=logger)
        assert not torch.equal(logits(student), before)


@pytest.mark.slow
def test_a_resumed_run_replaces_its_own_export():
    keep = {"dirpath": "checkpoints", "filename": "{step}", "every_n_train_steps": 2}
    kwargs = {"enable_checkpointing": True}
    fit(sft(), HFExport("student"), ModelCheckpoint(**keep), **kwargs)
    first, module = logits("student"), sft()
    resumed = {"ckpt_path": "checkpoints/step=2.ckpt", "steps": 4}
    fit(module, HFExport("student"), ModelCheckpoint(**keep), **kwargs, **resumed)
    assert torch.equal(logits("student"), module.student.eval()(IDS).logits)
    assert not torch.equal(logits("student"), first)
    saved("other")
    refused(sft(), HFExport("other"), "model in .*other already", **resumed)


def test_a_resumed_run_does_not_replace_the_export_of_another_run():
    keep = {"dirpath": "checkpoints", "filename": "{step}", "every_n_train_steps": 2}
    fit(sft(), HFExport("elsewhere"), ModelCheckpoint(**keep), enable_checkpointing=True)
    shutil.rmtree("elsewhere")
    fit(sft(lr=0.2), HFExport("elsewhere"))  # of another run, where the first one would export
    before = logits("elsewhere")
    resumed = {"ckpt_path": "checkpoints/step=2.ckpt", "steps": 4}
    refused(sft(), HFExport("elsewhere"), "model in .*elsewhere already", **resumed)
    assert torch.equal(logits("elsewhere"), before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_ones_own_in_an_export_are_named_and_stay(overwrite):
    keep = {"dirpath": "checkpoints", "filename": "{step}", "every_n_train_steps": 2}
    fit(sft(), HFExport("student"), ModelCheckpoint(**keep), enable_checkpointing=True)
    resumed = {"ckpt_path": "checkpoints/step=2.ckpt", "steps": 4}
    for name in ("my_notes.txt", "eval_results.json", "tokenizer_notes.txt"):
        Path("student", name).write_text("precious")
        refused(sft(), HFExport("student", overwrite=overwrite), f"also has {name}", **resumed)
        Path("student", name).unlink()
    saved("other")
    Path("other/my_notes.txt").write_text("precious")
    refused(sft(), HFExport("other", overwrite=True), "also has my_notes.txt")


def test_of_two_runs_that_export_to_one_new_directory_one_is_refused(monkeypatch):
    """The second one begins to write while the first one does, and both are complete."""
    written = []
    whole = directory.write_student

    def write_student(module, weights, fresh):
        changed = whole(module, weights, fresh)
        written.append(fresh)
        if len(written) == 1:
            fit(sft(lr=0.2), HFExport("student"))
        return changed

    monkeypatch.setattr(directory, "write_student", write_student)
    with pytest.raises(ValueError, match=r"there is a model in .*student already"):
        fit(sft(), HFExport("student"))
    expected = sft(lr=0.2)
    fit(expected)
    assert torch.equal(logits("student"), expected.student.eval()(IDS).logits)
    assert len({*written}) == 2
    assert os.listdir() == ["student"]


def test_a_directory_of_ones_home_and_no_name_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fit(sft(), HFExport("~/student"))
    assert (tmp_path / "home/student/config.json").is_file()
    assert not Path("~").exists()
    with pytest.raises(ValueError, match=r"export.dirpath is empty"):
        HFExport("")


def best(**options):
    where = {"dirpath": "checkpoints", "save_on_train_epoch_end": False}
    return ModelCheckpoint(monitor="val/loss", save_top_k=1, **where, **options)


def test_the_best_weights_are_exported_on_request(capsys):
    """The first validation is the best: the loss increases with every step."""
    module = sft(maximize=True)
    monitor = best(filename="{step}")
    validated = {"limit_val_batches": 1, "val_check_interval": 1, "enable_checkpointing": True}
    fit(module, HFExport("student", weights="best"), monitor, steps=3, **validated)
    assert monitor.best_model_path.endswith("step=1.ckpt")
    expected = sft(maximize=True)
    fit(expected, steps=1)
    assert torch.equal(logits("student"), expected.student.eval()(IDS).logits)
    assert not torch.equal(logits("student"), module.student.eval()(IDS).logits)


def test_the_exported_weights_are_described_in_the_log(caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(sft(), HFExport("student"))
        validated = {"limit_val_batches": 1, "val_check_interval": 1, "enable_checkpointing": True}
        fit(sft(), HFExport("other", weights="best"), best(filename="b"), **validated)
    assert "student: its last weights, after 2 optimizer steps" in caplog.text
    assert "its best weights, with val/loss" in caplog.text
    assert "checkpoints/b.ckpt" in caplog.text


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_best_weights_need_a_monitor():
    refused(sft(), HFExport("student", weights="best"), "no ModelCheckpoint has a monitor")
    with pytest.raises(ValueError, match="unknown weights 'worst'"):
        HFExport(weights="worst")
    kwargs = {"enable_checkpointing": True}
    with pytest.raises(ValueError, match="there is no best checkpoint, because val/loss"):
        fit(sft(), HFExport("student", weights="best"), best(), **kwargs)
    assert not Path("student").exists()


@pytest.mark.parametrize("added", ["by peft", "by transformers"])
def test_adapters_of_a_given_model_are_merged(added):
    model = tiny_llama(0)
    if added == "by peft":
        model = LoRA(r=2).adapt(model)
    else:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    module = sft(StudentSpec.of(model), lr=1.0)
    fit(module, HFExport("student"), steps=3)
    assert {p.name for p in Path("student").glob("*.safetensors")} == {"model.safetensors"}
    expected = module.student.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits("student"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - tiny_llama(0)(IDS).logits).abs().max().item() > 1e-2


def test_adapters_that_cannot_be_merged_are_rejected():
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama(0), config)
    refused(
        sft(StudentSpec.of(model)), HFExport("student"), "PREFIX_TUNING, which cannot be merged"
    )
    with pytest.raises(ValueError, match="has adapters already"):
        StudentSpec.of(LoRA(r=2).adapt(tiny_llama(0)), lora=LoRA()).build(letter_tokenizer())


def test_a_failed_export_leaves_no_incomplete_directory_and_names_the_remedy():
    """As on a full disk; the command of the message exports the same student."""
    saved("old")
    old = files("old")
    keep = {"dirpath": "checkpoints", "filename": "last", "every_n_train_steps": 2}
    module = sft()

    class Limit(ModelCheckpoint):
        def on_train_end(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kwargs = {"enable_checkpointing": True}
    try:
        with pytest.raises(ValueError, match="could not be written") as error:
            fit(module, Limit(**keep), HFExport("old", overwrite=True), **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files("old") == old
    assert sorted(p.name for p in Path().iterdir()) == ["checkpoints", "old"]
    assert "--ckpt_path " in str(error.value)
    checkpoint = str(error.value).split("--ckpt_path ")[1].split()[0]
    again = sft()
    fit(again, HFExport("elsewhere"), ModelCheckpoint(**keep), ckpt_path=checkpoint, **kwargs)
    assert torch.equal(logits("elsewhere"), module.student.eval()(IDS).logits)


def _export(module):
    context = CardContext(TrainingRecord(), "student", "its weights")
    weights = module.student.state_dict()
    write_directory(module, weights, Path("student").resolve(), "run", context, overwrite=False)


def _export_for_ever(one, other, start):
    for number in range(start, 10**6):
        _export((one, other)[number % 2])


@pytest.mark.processes
def test_a_kill_at_any_time_leaves_one_of_the_two_models(monkeypatch):
    modules = []
    for seed in (0, 1):
        module = sft(StudentSpec.of(tiny_llama(seed)))
        module.student, module._tokenizer = tiny_llama(seed), letter_tokenizer()
        modules.append(module)
    expected = [module.student(IDS).logits for module in modules]
    _export(modules[0])
    seen = set()
    # A killed process would never give back the lock that processes share for them.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    for kill in range(12):
        process = multiprocessing.get_context("fork").Process(
            target=_export_for_ever, args=(*modules, kill % 2), daemon=True
        )
        process.start()
        time.sleep(0.05 + 0.013 * kill)
        assert process.is_alive()
        process.kill()
        process.join(timeout=10)
        found = [i for i in (0, 1) if torch.equal(logits("student"), expected[i])]
        assert len(found) == 1
        assert json.loads(Path("student/tokenizer_config.json").read_text())
        seen.update(found)
    assert seen == {0, 1}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_kill_between_any_two_calls_leaves_a_complete_directory(atomic, monkeypatch):
    """Where names cannot be exchanged, the old model may have another name, but is complete."""
    if not atomic:
        monkeypatch.setattr(filesystem, "_exchange", lambda *_: False)

    class Killed(BaseException):
        pass

    names = ("rename", "rmtree")
    for last in range(8):
        shutil.rmtree("place", ignore_errors=True)
        for name, text in (("place", "old"), ("place.fresh", "new")):
            Path(name).mkdir()
            Path(name, "file").write_text(text)
        calls = iter(range(100))

        def counted(call, last=last, calls=calls):
            def run(*arguments, **options):
                if next(calls) == last:
                    raise Killed
                return call(*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(Path, names[0], counted(Path.rename))
            patch.setattr(shutil, names[1], counted(shutil.rmtree))
            try:
                filesystem.replace_directory(Path("place.fresh"), Path("place"))
                done = True
            except Killed:
                done = False
        left = {p.name: (p / "file").read_text() for p in Path().iterdir() if (p / "file").exists()}
        if atomic:
            assert left["place"] in {"old", "new"}
        else:
            assert "place" in left or left == {"place.old": "old", "place.fresh": "new"}
        for name in ("place.old", "place.fresh"):
            shutil.rmtree(name, ignore_errors=True)
        if done:
            assert left["place"] == "new"
            assert os.listdir() == ["place"]
            return
    raise AssertionError("it never came to its end")
