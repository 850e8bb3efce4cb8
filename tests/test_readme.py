"""What the README and the docs show is run, on models and data small enough for a test."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_kd.cli.main import main
from tests.support.command_line import EXPECTED_WARNINGS, QUIET, SMALL, run
from tests.support.toys import tiny_llama

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.command_line]

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands():
    lines = "\n".join(blocks(README, "bash")).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("lightning-kd ")]


FROM_A_STUDENT = ("on_policy_distillation", "minillm", "rl_distillation", "opsd")

SAVE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_last": True},
}


def shrink(command):
    """The command as it stands, and after it what makes it quick."""
    name, text = command[1], " ".join(command)
    if name == "tokenizer":
        return [*command, "--vocab_size", "280"]
    if name == "export":  # refuses what belongs to training
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
        small += [] if "--trainer.devices" in text else ["--trainer.devices", "1"]
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


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_every_command_of_the_readme_runs_in_order(workplace, monkeypatch, capsys):
    assert len(commands()) >= 10
    for command in commands():
        if "--trainer.strategy" in command:  # which starts further processes
            done = run(sys.executable, "-m", "lightning_kd", *shrink(command)[1:])
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            monkeypatch.setattr(sys, "argv", shrink(command))
            main()
            capsys.readouterr()
    assert (workplace / "written.jsonl").exists()
    assert (workplace / "runs" / "teacher" / "model.safetensors").exists()
    last = workplace / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] in {2, 4}


def test_the_yaml_of_the_readme_is_a_config(tmp_path, monkeypatch, capsys):
    (config,) = blocks(README, "yaml")
    (tmp_path / "own.yaml").write_text(config)
    monkeypatch.setattr(
        sys, "argv", ["lightning-kd", "fit", "--config", "own.yaml", "--print_config"]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in {0, None}
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["student"]["init_args"]["lora"]["r"] == 16


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    from lightning_kd import arithmetic_tokenizer

    tiny_llama(1, vocab_size=14).save_pretrained(tmp_path / "runs" / "teacher")
    arithmetic_tokenizer().save_pretrained(tmp_path / "runs" / "teacher")
    (program,) = blocks(README, "python")
    quick = "enable_progress_bar=False, logger=False, limit_val_batches=1, num_sanity_val_steps=0"
    program = program.replace("max_steps=100", f"max_steps=2, {quick}")
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    assert isinstance(names["trainer"], L.Trainer)
    assert names["trainer"].global_step == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_python_of_the_page_on_data_runs():
    program = "\n".join(blocks((ROOT / "docs" / "data.md").read_text(), "python"))
    names: dict = {}
    exec(compile(program, "data.md", "exec"), names)
    assert names["trainer"].global_step == 2


def test_the_python_of_the_docs_runs():
    """In a process of its own: it registers a divergence."""
    program = "\n".join(blocks((ROOT / "docs" / "divergences.md").read_text(), "python"))
    check = 'from lightning_kd import make_divergence\nprint(make_divergence("squared_difference"))'
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "SquaredDifference(scale=1.0)"
