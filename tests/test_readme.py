"""What the README and the pages show is run, on models and data small enough for a test."""

import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_kd import ArithmeticData, SupervisedKD, arithmetic_tokenizer
from lightning_kd.cache import read_manifest
from lightning_kd.cli.main import main
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, QUIET, SMALL, run
from tests.support.harness import trainer
from tests.support.pages import ROOT, blocks, commands
from tests.support.toys import letter_tokenizer, tiny_llama

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.command_line]

FROM_A_STUDENT = ("on_policy_distillation", "minillm", "rl_distillation", "opsd")

IN_PROCESSES = re.compile(r"--trainer.strategy|overlays/(ddp|fsdp2)")

SAVE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_last": True, "monitor": "train/loss"},
}


def shrink(command):
    """The command as it stands, and after it what makes it quick."""
    name, text = command[1], " ".join(command)
    if name == "tokenizer":
        return [*command, "--vocab_size", "280"]
    if name in {"check", "export"}:  # the one trains nothing, the other refuses what does
        return command
    small = [
        *QUIET[:2],
        *QUIET[4:],
        "--trainer.limit_val_batches",
        "1",
        "--trainer.num_sanity_val_steps",
        "0",
    ]
    small += ["--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1"]
    if name == "fit":
        steps = "4" if "--ckpt_path" in text else "2"
        small += ["--trainer.max_steps", steps, "--trainer.val_check_interval", "2"]
        small += ["--data.batch_size", "4"]
        if not any(name in text for name in FROM_A_STUDENT):
            small += ["--model.student.config", SMALL]
        small += ["--trainer.log_every_n_steps", "1", "--trainer.precision", "32-true"]
        small += ["--trainer.callbacks", json.dumps([SAVE])]
        several = "--trainer.devices" in text or IN_PROCESSES.search(text)
        small += [] if several else ["--trainer.devices", "1"]
        small += ["--trainer.enable_checkpointing", "true"]
    return [*command, *small]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the configs and with what a reader would bring along."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = "to be or not to be that is the question " * 400
    for name in ("corpus.txt", "dev.txt"):
        (tmp_path / name).write_text(text)
    (tmp_path / "gsm8k").mkdir()
    for name in ("fit", "validation"):
        row = json.dumps({"question": "What is 1+1?", "answer": "It is 2.\n#### 2"})
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join([row] * 4))
    for seed, name in enumerate(("teacher_llama", "teacher_gpt2")):
        sizes = {"vocab_size": 280, "max_position_embeddings": 128}
        tiny_llama(seed, **sizes).save_pretrained(tmp_path / "runs" / name)
    return tmp_path


def perform(command, monkeypatch):
    """Run a command, in this process unless it starts further ones."""
    if IN_PROCESSES.search(" ".join(command)):
        done = run(sys.executable, "-m", "lightning_kd", *shrink(command)[1:])
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", shrink(command))
        main()


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_every_command_of_the_readme_runs_in_order(workplace, monkeypatch, capsys):
    found = commands("README.md")
    assert len(found) >= 3
    for command in found:
        perform(command, monkeypatch)
        capsys.readouterr()
    assert (workplace / "runs" / "version_1" / "student" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_every_command_of_the_first_page_runs_in_order(workplace, monkeypatch, capsys):
    found = commands("docs/get_started.md")
    assert len(found) >= 20
    for command in found:
        perform(command, monkeypatch)
        capsys.readouterr()
    assert (workplace / "written.jsonl").exists()
    assert (workplace / "runs" / "teacher" / "model.safetensors").exists()
    last = workplace / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] in {2, 4}
    loads, _ = blocks("docs/get_started.md", "python")
    assert executed("docs/get_started.md", loads.text)["student"].config.hidden_size == 16


@pytest.mark.parametrize("page", ["exporting", "preflight", "resuming", "scaling"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.slow
def test_every_command_of_a_page_runs_after_a_run(page, workplace, monkeypatch, capsys):
    """A teacher is there, and a run that has trained on two batches."""
    first = "lightning-kd fit --config configs/sft.yaml"
    perform([*first.split(), "--export.dirpath", "runs/teacher"], monkeypatch)
    found = commands(f"docs/{page}.md")
    assert found
    for command in found:
        perform(command, monkeypatch)
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_of_the_page_on_data_scores_the_texts(workplace, monkeypatch, capsys):
    tokenizer = letter_tokenizer()
    tiny_llama(3, vocab_size=len(tokenizer)).save_pretrained("models/stories260K")
    tokenizer.save_pretrained("models/stories260K")
    rows = [json.dumps({"text": text}) for text in (" abcab", "hgfe ", "abc") * 3]
    (workplace / "heldout.jsonl").write_text("\n".join(rows))
    (command,) = commands("docs/data.md")
    perform(command, monkeypatch)
    assert "val/loss" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.slow
def test_configs_are_compared_as_the_page_says(tmp_path):
    """The files that it names, at the size of a test."""
    (tmp_path / "configs").mkdir()
    tiny_llama(1, vocab_size=14).save_pretrained("runs/teacher")
    arithmetic_tokenizer().save_pretrained("runs/teacher")
    for name in ("sft", "supervised_kd"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        config["model"]["init_args"]["student"] = {"config": yaml.safe_load(SMALL)}
        config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu"}
        config["data"] |= {"init_args": {"batch_size": 4, "train_size": 8, "validation_size": 4}}
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (command,) = (words for words in commands("docs/comparing.md") if "--configs" in words)
    done = run(sys.executable, "-m", "lightning_kd", *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("sft", "supervised_kd"):
        assert len(list(Path("runs").glob(f"*/{name}/[012]/result.json"))) == 3


def test_the_yaml_of_the_first_page_is_a_config(tmp_path, monkeypatch, capsys):
    (block,) = blocks("docs/get_started.md", "yaml")
    (tmp_path / "own.yaml").write_text(block.text)
    monkeypatch.setattr(
        sys, "argv", ["lightning-kd", "fit", "--config", "own.yaml", "--print_config"]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in {0, None}
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["student"]["init_args"]["lora"]["r"] == 16


def executed(page, program=None, **names):
    """Run the Python of a page, and return its names."""
    program = program or "\n".join(block.text for block in blocks(page, "python"))
    exec(compile(program, page, "exec"), names)
    return names


def test_the_python_of_the_first_page_runs(tmp_path):
    tiny_llama(1, vocab_size=14).save_pretrained(tmp_path / "runs" / "teacher")
    arithmetic_tokenizer().save_pretrained(tmp_path / "runs" / "teacher")
    _, block = blocks("docs/get_started.md", "python")
    quick = "enable_progress_bar=False, logger=False, limit_val_batches=1, num_sanity_val_steps=0"
    program = block.text.replace("max_steps=100", f"max_steps=2, {quick}")
    names = executed("docs/get_started.md", program)
    assert isinstance(names["trainer"], L.Trainer)
    assert names["trainer"].global_step == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_python_of_the_page_on_data_runs():
    assert executed("docs/data.md")["trainer"].global_step == 2


def test_the_python_of_the_page_on_caches_writes_one(saved_teacher):
    module = SupervisedKD(student=tiny_llama(0, vocab_size=14), teacher=str(saved_teacher))
    data = ArithmeticData(train_size=8, validation_size=4, batch_size=4)
    executed("docs/cache.md", trainer=trainer(), module=module, data=data)
    assert read_manifest(Path("runs/teacher_cache")).rows == 12


def test_the_reward_of_the_page_on_own_completions_is_one():
    brevity = executed("docs/on_policy.md")["brevity"]
    assert brevity(prompts=["a", "b"], completions=["four", ""], references=[[], []]) == [-4, 0]


def test_the_callback_of_the_page_on_resuming_remembers_its_arguments():
    curriculum = executed("docs/resuming.md")["Curriculum"]
    one, other, loud = curriculum(3), curriculum(4), curriculum(3, verbose=True)
    assert one.resume_settings() == loud.resume_settings() != other.resume_settings()


def test_the_python_of_the_page_on_divergences_runs():
    """In a process of its own: it registers a divergence."""
    program = "\n".join(block.text for block in blocks("docs/divergences.md", "python"))
    check = 'from lightning_kd import make_divergence\nprint(make_divergence("squared_difference"))'
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "SquaredDifference(scale=1.0)"
