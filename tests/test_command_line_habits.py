"""What users of Lightning, transformers and TRL type from habit on the command line."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lightning_kd.cli_habits import ELSEWHERE
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, QUIET, SMALL, scalars

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.command_line]

SFT = ["fit", "--config", CONFIGS / "sft.yaml"]
TINY = [*QUIET, "--data.train_size", 32, "--data.validation_size", 8, "--data.batch_size", 8]
SAVING = json.dumps(
    [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {"monitor": "val/loss", "every_n_train_steps": 2, "save_last": True},
        }
    ]
)


def steps():
    """Optimizer steps of the only run, by its log."""
    return scalars("runs").Scalars("train/loss")[-1].step + 1


def saved_config():
    (path,) = Path("runs").glob("version_*/config.yaml")
    return yaml.safe_load(path.read_text())


LOGGED = [*TINY, "--model.student.config", SMALL, "--trainer.log_every_n_steps", 1]
FEW = [*LOGGED, "--trainer.max_steps", 2, "--trainer.val_check_interval", 2]


def test_fewer_steps_than_the_config_has(cli):
    cli(*SFT, *LOGGED, "--trainer.max_steps", 5)
    assert steps() == 5


def test_epochs_instead_of_steps(cli):
    cli(*SFT, *LOGGED, "--trainer.max_steps", -1, "--trainer.max_epochs", 2)
    assert steps() == 2 * 32 // 8


def test_a_short_config_flag_and_a_fast_dev_run_that_leaves_nothing(cli):
    cli("fit", "-c", CONFIGS / "sft.yaml", *LOGGED, "--trainer.fast_dev_run", "true")
    assert not Path("runs").exists()


def test_no_config_at_all(cli):
    cli("fit", "--model", "SFT", "--data", "ArithmeticData", *FEW)
    assert steps() == 2


@pytest.mark.parametrize("by", ["name_or_path", "a name alone", "an overlay"])
def test_a_pretrained_student_in_the_place_of_a_configs_random_one(cli, teacher, by):
    Path("mine.yaml").write_text(
        json.dumps({"model": {"init_args": {"student": {"name_or_path": str(teacher)}}}})
    )
    given = {
        "name_or_path": ["--model.student.name_or_path", teacher],
        "a name alone": ["--model.student", teacher],
        "an overlay": ["--config", "mine.yaml"],
    }[by]
    cli(*SFT, *given, *TINY, "--trainer.max_steps", 1)
    student = saved_config()["model"]["init_args"]["student"]
    student = student.get("init_args", student) if isinstance(student, dict) else student
    assert str(teacher) in (student, student["name_or_path"] if isinstance(student, dict) else "")


def test_a_random_student_in_the_place_of_a_pretrained_one(cli, teacher):
    Path("mine.yaml").write_text(
        json.dumps({"model": {"init_args": {"student": {"name_or_path": str(teacher)}}}})
    )
    cli(*SFT, "--config", "mine.yaml", *FEW)
    student = saved_config()["model"]["init_args"]["student"]
    assert student.get("init_args", student)["config"]["hidden_size"] == 16


def test_a_teacher_by_its_name_alone(cli, teacher):
    cli("fit", "--config", CONFIGS / "supervised_kd.yaml", "--model.teacher", teacher, *FEW)
    assert scalars("runs").Scalars("train/forward_kl")


def test_print_config_into_a_file_and_back(cli, capsys):
    cli_print = [*SFT, *FEW, "--print_config"]
    with pytest.raises(SystemExit):
        cli(*cli_print)
    Path("mine.yaml").write_text(capsys.readouterr().out)
    cli("fit", "--config", "mine.yaml")
    assert steps() == 2


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"], "metrics.csv"),
        (["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb"], "events.*"),
        (["--trainer.profiler", "simple"], "events.*"),
        (["--trainer.precision", "bf16-true"], "model.safetensors"),
        (["--trainer.accumulate_grad_batches", 2, "--trainer.gradient_clip_val", 1], "config.yaml"),
        (["--trainer.limit_train_batches", 0.5, "--trainer.max_epochs", 1], "config.yaml"),
        (["--seed_everything", 7], "config.yaml"),
    ],
)
def test_lightnings_options(flags, left, cli):
    cli(*SFT, *FEW, *flags)
    assert list(Path().rglob(left))


@pytest.mark.parametrize("callback", ["LearningRateMonitor", "RichProgressBar", "ModelSummary"])
def test_one_more_callback(cli, callback):
    words = [str(word) for word in FEW]
    for flag in ("--trainer.enable_progress_bar", "--trainer.enable_model_summary"):
        at = words.index(flag)
        del words[at : at + 2]
    cli(*SFT, *words, f"--trainer.callbacks+={callback}")
    assert callback in str(saved_config()["trainer"]["callbacks"])


def test_early_stopping_by_a_flag(cli):
    flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    cli(*SFT, *FEW, *flags)
    assert any(
        "EarlyStopping" in callback["class_path"]
        for callback in saved_config()["trainer"]["callbacks"]
    )


def test_the_best_and_the_last_checkpoint_by_name(cli, capsys):
    cli(*SFT, *FEW, "--trainer.callbacks", SAVING, "--data.test_size", 8)
    saved = "runs/version_0/config.yaml"
    for command, which in (("validate", "best"), ("test", "last"), ("predict", "best")):
        cli(command, "--config", saved, "--ckpt_path", which)
    assert "test/loss" in capsys.readouterr().out
    assert Path("predictions.jsonl").read_text().count("\n") == 8


def test_ones_own_rows(cli, teacher):
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(9)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", "PromptCompletionData", "--data.train", "train.jsonl"]
    data += ["--data.tokenizer", teacher, "--data.batch_size", 3]
    logged = ["--trainer.log_every_n_steps", 1, "--trainer.max_epochs", 1]
    cli("fit", "--model", "SFT", *data, *QUIET, *logged, "--model.student.config", SMALL)
    assert steps() == 3


def test_a_tokenizer_of_one_file(cli):
    Path("corpus.txt").write_text("to be or not to be that is the question " * 50)
    cli("tokenizer", "--files", "corpus.txt", "--vocab_size", 280, "--output", "mine")
    assert Path("mine/tokenizer.json").exists()


VALUES = {
    "--model.divergence.beta": ["GeneralizedJSD", "--model.divergence.beta", 0.3],
    "--data.train": None,  # of other data than the config's
    "--data.max_length": None,
    "--model.student.lora": None,
    "--trainer.logger": ["CSVLogger"],
    "--model.lr_scheduler": ["WarmupCosine"],
    "--model.optimizer": ["torch.optim.SGD"],
    "--model.student.name_or_path": ["runs/start"],
    "--model.teacher.name_or_path": ["runs/teacher"],
    "--trainer.default_root_dir": ["runs"],
    "--model.student.dtype": ["bfloat16"],
    "--model.student.gradient_checkpointing": ["true"],
    "--ckpt_path": None,
}


@pytest.mark.parametrize("typed", ELSEWHERE)
def test_an_option_of_another_library_is_answered_with_ours_which_exists(typed, fails, cli, capsys):
    config = ["fit", "--config", CONFIGS / "gkd.yaml"]
    meant = ELSEWHERE[typed]
    assert f"--{typed}: did you mean {meant}?" in fails(*config, f"--{typed}", "1")
    option, *value = meant.split()
    value = value or VALUES.get(option, [1])
    if value is None:
        return
    flags = (
        ["--model.divergence", *value] if option == "--model.divergence.beta" else [option, *value]
    )
    with pytest.raises(SystemExit) as end:
        cli(*config, *flags, "--print_config")
    assert not end.value.code, capsys.readouterr().err
    yaml.safe_load(re.sub(r"^#.*", "", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--devices", 2], "did you mean --trainer.devices?"),
        (["--strategy", "ddp"], "did you mean --trainer.strategy?"),
        (["--max_steps", 5], "did you mean --trainer.max_steps?"),
        (["--trainer.gpus", 1], "--trainer.gpus"),
        (["--model.divergnce", "reverse_kl"], "did you mean --model.divergence?"),
    ],
)
def test_an_option_at_the_wrong_place_is_answered_with_the_right_one(typed, said, fails):
    assert said in fails("fit", "--config", CONFIGS / "gkd.yaml", *typed)
