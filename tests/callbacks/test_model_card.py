"""What a model card says: true, complete, and nothing that is nobody's business."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_kd.callbacks import HFExport
from lightning_kd.callbacks.export import session
from lightning_kd.callbacks.export.card import CardContext, model_card
from lightning_kd.callbacks.export.options import base_model
from lightning_kd.callbacks.export.redaction import presentable, presentable_command
from lightning_kd.callbacks.export.training_record import TrainingRecord
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.modules import SFT, SupervisedKD
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

pytestmark = EXPECTED_WARNINGS

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
VALIDATED = {"limit_val_batches": 1, "val_check_interval": 1, "enable_checkpointing": True}
IDS = torch.arange(2, 12)[None]


def saved(name, seed=1):
    tiny_llama(seed).save_pretrained(name)
    letter_tokenizer().save_pretrained(name)
    return name


def fit(module, *callbacks, steps=2, ckpt_path=None, **options):
    fitted = trainer(max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **options)
    data = BatchList([BATCH] * steps, evaluate=[BATCH] * steps)
    fitted.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return fitted


def distilled(**options):
    return SupervisedKD(
        student=StudentSpec(saved("start")),
        teacher=LocalTeacher(saved("teacher", 2)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, **options),
        divergence="generalized_jsd",
        alpha=0.25,
    )


def card(directory="student"):
    """The front matter, the text, and the blocks of it by language."""
    text = Path(directory, "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    blocks = {b.partition("\n")[0]: b.partition("\n")[2] for b in body.split("```")[1::2]}
    return yaml.safe_load(front), body, blocks


def rows(body, heading):
    """The rows of the table under a heading."""
    under = body.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in under.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1] for cells in lines[2:]}


def test_a_card_says_how_the_student_was_made_and_its_lines_load_it(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    module = distilled()
    fitted = fit(module, HFExport("student"), **VALIDATED)
    front, body, blocks = card()
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["lightning-kd", "knowledge-distillation", "supervised-kd"]
    training = rows(body, "Training")
    assert training["method"] == "SupervisedKD"
    assert training["student started from"] == "start"
    assert training["teacher"] == "teacher"
    assert training["divergence"] == "GeneralizedJSD(beta=0.5, normalized=False)"
    assert training["data"] == "BatchList"
    assert training["weights"] == "its last weights, after 2 optimizer steps"
    options = yaml.safe_load(blocks["yaml"])
    assert options["model"]["alpha"] == 0.25
    assert options["optimizer"] == {"class": "SGD", "lr": 0.1}
    assert options["trainer"]["seed"] == 17
    measured = rows(body, "Validation after 2 optimizer steps")
    values = {n: v.item() for n, v in fitted.callback_metrics.items() if n.startswith("val/")}
    assert {"val/loss", "val/reverse_kl"} <= values.keys() == measured.keys()
    for name, value in measured.items():
        assert float(value) == pytest.approx(values[name], rel=1e-5)
    loaded = {}
    exec(blocks["python"], loaded)
    module.student.eval()
    assert torch.equal(loaded["model"](IDS).logits, module.student(IDS).logits)
    assert loaded["tokenizer"].get_vocab() == letter_tokenizer().get_vocab()
    assert len(blocks["python"].strip().splitlines()) == 4


def test_several_teachers_and_no_teacher():
    ensemble = TeacherEnsemble([LocalTeacher(saved(name, 2)) for name in ("one", "two")])
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=ensemble)
    fit(module, HFExport("student"))
    assert rows(card()[1], "Training")["teacher"] == "one, two"
    fit(SFT(student=StudentSpec.of(tiny_llama(0))), HFExport("alone"))
    front, body, _ = card("alone")
    assert front["tags"] == ["lightning-kd", "sft"]
    assert "teacher" not in rows(body, "Training")
    assert "Validation" not in body  # there was none


def test_how_models_were_loaded_is_told_where_it_is_not_the_default():
    pytest.importorskip("peft")
    student = StudentSpec(saved("start", 1), lora=LoRA(r=4, alpha=8), dtype="bfloat16")
    teacher = LocalTeacher(saved("teacher", 2), dtype="bfloat16")
    fit(SupervisedKD(student=student, teacher=teacher), HFExport("student"))
    told = yaml.safe_load(card()[2]["yaml"])["model"]
    lora = told["student"].pop("lora")["LoRA"]
    assert told["student"] == {"from": "start", "dtype": "bfloat16"}
    assert (lora["r"], lora["alpha"]) == (4, 8)
    assert told["teacher"] == {"from": "teacher", "dtype": "bfloat16"}


def test_the_best_weights_come_with_their_own_validation():
    module = distilled(maximize=True)  # so that the first validation is the best
    monitor = ModelCheckpoint("c", monitor="val/loss", filename="{step}")
    found = []

    class Watch(ModelCheckpoint):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                found.append(trainer.callback_metrics["val/loss"].item())

    export = HFExport("student", weights="best")
    fit(module, export, monitor, Watch(save_top_k=0), steps=3, **VALIDATED)
    _, body, _ = card()
    measured = rows(body, "Validation after 1 optimizer steps")
    assert float(measured["val/loss"]) == pytest.approx(found[0], rel=1e-5)
    assert found[0] < found[-1]
    assert "its best weights, with val/loss" in rows(body, "Training")["weights"]
    assert str(Path.cwd()) not in body


def test_a_resumed_run_names_each_command_once_and_keeps_what_was_measured(monkeypatch):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["/usr/local/bin/lightning-kd", "fit", *arguments])

    keep = {"dirpath": "c", "filename": "{step}", "every_n_train_steps": 2}
    command("--data.prompt_template", "Q: {prompt}\nA:")
    fit(distilled(), HFExport("student"), ModelCheckpoint(**keep), **VALIDATED)
    shown = card()[2]["bash"].strip().splitlines(keepends=True)
    assert shown[0].startswith("# lightning_kd 0.")
    assert shlex.split("".join(shown[1:])) == [
        *("lightning-kd", "fit", "--data.prompt_template", "Q: {prompt}\nA:"),
    ]
    command("--trainer.max_steps", "4")
    resumed = {"ckpt_path": "c/step=2.ckpt", "steps": 4, "enable_checkpointing": True}
    fit(distilled(), HFExport("student"), ModelCheckpoint(**keep), **resumed)
    _, body, blocks = card()
    assert blocks["bash"].count("# lightning_kd") == 2
    assert blocks["bash"].strip().endswith("lightning-kd fit --trainer.max_steps 4")
    # The checkpoint was saved before the second validation, and the resumed run has none.
    assert rows(body, "Validation after 1 optimizer steps")
    assert "after 4 optimizer steps" in rows(body, "Training")["weights"]
    resumed |= {"ckpt_path": "c/step=4.ckpt", "steps": 5}
    fit(distilled(), HFExport("student"), ModelCheckpoint(**keep), **resumed)
    assert card()[2]["bash"].count("# lightning_kd") == 2  # the same command again


def test_a_base_model_is_a_name_of_the_hub_or_that_which_a_card_tells():
    assert base_model(StudentSpec("Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    assert base_model(StudentSpec(config={"model_type": "llama"})) is None
    saved("start")
    assert base_model(StudentSpec("start")) is None
    Path("start/README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\n")
    assert base_model(StudentSpec("start")) == "Qwen/Qwen3-0.6B"
    Path("start/README.md").write_text("no front matter")
    assert base_model(StudentSpec("start")) is None
    Path("start/README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\n")
    fit(SFT(student=StudentSpec("start")), HFExport("student"))
    assert card()[0]["base_model"] == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("train", "told"),
    [("openai/gsm8k", ["openai/gsm8k"]), ("data.jsonl", None), ("a/b.csv", None), ("here", None)],
)
def test_a_data_set_of_the_hub_is_told_to_the_hub(train, told):
    Path("here").mkdir()
    record = TrainingRecord("GKD", teachers=["a"], data={"class": "ChatData", "train": train})
    made = model_card(CardContext(record, "student", "weights | of é"), {})
    assert made.data.get("datasets") == told
    assert rows(made.text, "Training")["data"] == f"ChatData: {train}"


def test_nothing_of_the_machine_and_no_secret_is_in_a_card(monkeypatch, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-of-ada"
    outside.mkdir()
    arguments = [
        *("--data.train", f"{outside}/private/train.jsonl", "--hf_token", "tell-no-one"),
        *("--trainer.logger.init_args.api_key=also-secret", "--seed", "1"),
        *("--trainer.logger", "{name: a, api_key: third-secret}", f"--config={tmp_path}/own.yaml"),
        *("--url", "https://ada:fourth@example.org/x", "--note", "it is value-of-variable"),
    ]
    monkeypatch.setenv("OTHER_API_KEY", "value-of-variable")
    monkeypatch.setattr(sys, "argv", [f"{outside}/bin/train.py", *arguments])
    tiny_llama(1).save_pretrained(outside / "teacher")
    letter_tokenizer().save_pretrained(outside / "teacher")
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher(str(outside / "teacher"))
    )
    fit(module, HFExport("student"))
    text = Path("student/README.md").read_text()
    for secret in (
        *("tell-no-one", "also-secret", "third-secret", "ada:fourth", "value-of-variable"),
        *(str(tmp_path), str(outside), "of-ada"),
    ):
        assert secret not in text
    shown = shlex.split(card()[2]["bash"].splitlines()[1])
    assert shown[:4] == ["python", ".../train.py", "--data.train", ".../train.jsonl"]
    assert shown[4:6] == ["--seed", "1"]
    assert "--config=own.yaml" in shown
    assert rows(card()[1], "Training")["teacher"] == ".../teacher"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("max_new_tokens: 5, tokenizer: gpt2, normalization: token", None),
        ("{pad_token: <pad>, eos_token_id: 2}", None),
        ("either/or, 1/2, runs/version_0/x.ckpt, ./a/b", None),
        ("../c/d, http://localhost:8000/v1/x", ".../d, http://localhost:8000/v1/x"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", None),
        ('{"token": "abc", "lr": 1}', '{"token": ..., "lr": 1}'),
        ("--x.secret=abc def", "--x.secret=... def"),
        ("Bearer abcdefghijklmnop", "..."),
        ("hf_abcdefghijklmnopqrst", "..."),
        ("~/models/a, /data/b.txt", ".../a, .../b.txt"),
        ('["/data/b.txt","/data/c/"]', '[".../b.txt",".../c"]'),
        ("/home/ada lovelace/my project/train.jsonl", ".../train.jsonl"),
        ("/home/ada/my dir/f,/home/ada/other", ".../f,.../other"),
        ("/home/ada/s(1)/private/x.jsonl", ".../x.jsonl"),
        ("/home/ada/a:b/private/x, host:/home/ada/x", ".../x, host:.../x"),
        ("file:///home/ada/private/x.jsonl", ".../x.jsonl"),
        (r"C:\Users\ada b\private\x, D:/ada/x", ".../x, .../x"),
        (r"\\server\share\ada\x", ".../x"),
        ("../../home/ada/x, runs/../../ada/x", ".../x, .../x"),
        ("~nobody/private/x", ".../x"),
        ("Q: {prompt}\\nA:\\n{completion}", None),
        ("wandb_key: 0123, private_key: MIIE", "wandb_key: ..., private_key: ..."),
        ("SOME_KEY=abc pass=hunter2 passphrase=x", "SOME_KEY=... pass=... passphrase=..."),
        ('{"Authorization": "Basic dXNlcjpw"}', '{"Authorization": "..."}'),
        ("Authorization: Basic dXNlcjpw", "Authorization: ..."),
        ("AKIAIOSFODNN7EXAMPLE", "..."),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijk", "..."),
        ("https://h/x?sig=abc%2F&se=1", "https://h/x?sig=...&se=1"),
        ("https://h/x?se=1&X-Amz-Signature=abc", "https://h/x?se=1&X-Amz-Signature=..."),
        ("s3://K:a/b@bucket/x", "s3://bucket/x"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "..."),
    ],
)
def test_what_is_left_out_and_what_is_not(text, shown):
    assert presentable(text) == (text if shown is None else shown)


def test_paths_inside_the_working_directory_are_seen_from_it(monkeypatch):
    here = Path.cwd()
    monkeypatch.setenv("PWD", str(here))  # is no password
    assert presentable(f"{here}/a/b, ../{here.name}/c, a/../b/c") == "a/b, c, b/c"


def test_options_and_variables_named_key_are_secrets(monkeypatch):
    command = ["x", "--wandb_key", "abc", "--a.key=b", "--auth", "c", "--b", "1"]
    assert presentable_command(command) == ["x", "--b", "1"]
    monkeypatch.setenv("SOME_KEY", "value-of-key")
    monkeypatch.setenv("MY_PASSPHRASE", "value-of-phrase")
    assert presentable("value-of-key value-of-phrase") == "... ..."


@pytest.mark.parametrize("name", ['q"); import os; os.abort() #', "a\nb", "a\\b", "```\n", "ünï😀"])
def test_a_card_holds_a_name_or_an_option_as_text_alone(name):
    told = {"version": "0.1", "command": "lightning-kd fit --a 'x\n```\n# not a heading\n'"}
    record = TrainingRecord("SFT", model={"a": "x\n```\ny"}, sessions=[told])
    text = model_card(CardContext(record, name, "last"), {}).text
    blocks = {}
    for fence, language, block in re.findall(r"^(```+)(\w+)\n(.*?)\n\1$", text, re.M | re.S):
        assert fence not in block
        blocks[language] = block
    calls = [n for n in ast.walk(ast.parse(blocks["python"])) if isinstance(n, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [name, name]
    assert blocks["bash"] == f"# lightning_kd 0.1\n{told['command']}"
    assert yaml.safe_load(blocks["yaml"])["model"] == record.model


def test_a_secret_without_a_value_takes_no_other_option_with_it():
    command = ["x", "--a.token", "--b", "1", "--password=p", "--c", "2", "--tokens", "3"]
    assert presentable_command(command) == ["x", "--b", "1", "--c", "2", "--tokens", "3"]


@pytest.mark.processes
def test_the_commit_is_that_of_git(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert session.commit_of(tmp_path) == ""
    git("init", "-q")
    assert session.commit_of(tmp_path) == ""  # without a commit
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    Path("inside").mkdir()
    assert session.commit_of(tmp_path / "inside") == git("rev-parse", "HEAD")
    Path("file").write_text("2")
    changed = f"{git('rev-parse', 'HEAD')} with uncommitted changes"
    assert session.commit_of(tmp_path) == changed
    fit(distilled(), HFExport("student"))
    assert f", commit {changed}" in card()[2]["bash"]
    slow = Path("bin/git")
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent.resolve()), prepend=":")
    monkeypatch.setattr(session, "_GIT_TIMEOUT", 0.2)
    assert session.commit_of(tmp_path) == ""


def test_the_card_of_a_checkpoint_written_by_an_earlier_version_is_made_all_the_same():
    keep = {"dirpath": "c", "filename": "last", "every_n_train_steps": 2}
    fit(distilled(), HFExport("student"), ModelCheckpoint(**keep), enable_checkpointing=True)
    saved_state = torch.load("c/last.ckpt", weights_only=True)
    (key,) = (key for key in saved_state["callbacks"] if key == "HFExport")
    del saved_state["callbacks"][key]["record"]
    torch.save(saved_state, "c/last.ckpt")
    resumed = {"ckpt_path": "c/last.ckpt", "steps": 3, "enable_checkpointing": True}
    fit(distilled(), HFExport("student"), **resumed)
    assert rows(card()[1], "Training")["method"] == "SupervisedKD"
    assert AutoModelForCausalLM.from_pretrained("student").config.hidden_size == 16
