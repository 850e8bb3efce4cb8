"""What users of Lightning, transformers and TRL type from habit on the command line."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.cli.habits import ELSEWHERE
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


def scalars_of(run):
    seen = EventAccumulator(str(run))
    seen.Reload()
    return seen


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


@pytest.mark.parametrize("by", ["name_or_path", "a name alone", "an overlay", "a name in one"])
def test_a_pretrained_student_in_the_place_of_a_configs_random_one(cli, teacher, by):
    spec = str(teacher) if by == "a name in one" else {"name_or_path": str(teacher)}
    Path("mine.yaml").write_text(json.dumps({"model": {"init_args": {"student": spec}}}))
    given = {
        "name_or_path": ["--model.student.name_or_path", teacher],
        "a name alone": ["--model.student", teacher],
    }.get(by, ["--config", "mine.yaml"])
    cli(*SFT, *given, *TINY, "--trainer.max_steps", 1, "--model.optimizer.lr", 0)
    student = saved_config()["model"]["init_args"]["student"]
    student = student.get("init_args", student)
    assert (student["name_or_path"], student["config"]) == (str(teacher), None)
    # Without a learning rate, what is exported is what was loaded.
    exported = load_file(next(Path("runs").glob("version_*/student/model.safetensors")))
    start = load_file(teacher / "model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in start.items())


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


EPOCH = [*LOGGED, "--trainer.max_steps", -1, "--trainer.max_epochs", 1]
"""Four micro-batches of eight rows."""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 4),
        (["--trainer.accumulate_grad_batches", 2], 2),
        (["--trainer.limit_train_batches", 0.5], 2),
        (["--trainer.limit_train_batches", 3], 3),
        (["--data.batch_size", 16], 2),
    ],
)
def test_steps_of_an_epoch(flags, expected, cli):
    cli(*SFT, *EPOCH, *flags)
    assert steps() == expected


def test_the_csv_logger_has_every_step(cli):
    cli(*SFT, *FEW, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    (path,) = Path("logs").rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["0", "1"]
    assert not list(Path().rglob("events.*"))


def test_another_tensorboard_logger(cli):
    cli(*SFT, *FEW, "--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb")
    (run,) = {path.parent for path in Path("tb").rglob("events.*")}
    assert [event.step for event in scalars_of(run).Scalars("train/loss")] == [0, 1]
    assert not Path("runs").exists()


def test_a_profiler_reports(cli, caplog):
    with caplog.at_level("INFO"):
        cli(*SFT, *FEW, "--trainer.profiler", "simple")
    assert "FIT Profiler Report" in caplog.text


def test_a_true_precision_is_that_of_the_export(cli):
    cli(*SFT, *FEW, "--trainer.precision", "bf16-true", "--export.dirpath", "student")
    exported = load_file("student/model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}


def test_clipping_bounds_what_a_step_changes(cli):
    """Plain gradient descent at rate 1 moves the weights by the norm of the gradient."""
    moved = []
    for clip in (0.01, 1000.0):
        flags = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 1]
        # The decay of the config's AdamW would go along to the other class.
        flags += ["--model.optimizer.weight_decay", 0, "--model.lr_scheduler", "null"]
        flags += ["--trainer.max_steps", 1]
        flags += ["--trainer.gradient_clip_val", clip, "--export.dirpath", f"student {clip}"]
        flags += ["--export.overwrite", "true"]
        cli(*SFT, *LOGGED, *flags, "--model.optimizer.lr", 0)
        before = load_file(f"student {clip}/model.safetensors")
        cli(*SFT, *LOGGED, *flags)
        after = load_file(f"student {clip}/model.safetensors")
        moved.append(sum(((after[n] - w) ** 2).sum() for n, w in before.items()).sqrt().item())
    assert moved[0] == pytest.approx(0.01, rel=1e-3)
    assert moved[1] > 0.02


def test_a_seed_is_another_run(cli):
    for seed in (0, 7, 7):
        cli(*SFT, *FEW, "--seed_everything", seed)
    events = [
        scalars_of(path).Scalars("train/loss")[0].value
        for path in sorted(Path("runs").glob("version_*"))
    ]
    assert events[1] == events[2] != events[0]


@pytest.mark.parametrize("callback", ["LearningRateMonitor", "RichProgressBar", "ModelSummary"])
def test_one_more_callback(cli, callback):
    words = [str(word) for word in FEW]
    for flag in ("--trainer.enable_progress_bar", "--trainer.enable_model_summary"):
        at = words.index(flag)
        del words[at : at + 2]
    cli(*SFT, *words, f"--trainer.callbacks+={callback}")
    assert callback in str(saved_config()["trainer"]["callbacks"])
    logged = any(tag.startswith("lr-") for tag in scalars("runs").Tags()["scalars"])
    assert logged == (callback == "LearningRateMonitor")


def test_early_stopping_by_a_flag(cli):
    flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    cli(*SFT, *FEW, *flags)
    assert any(
        "EarlyStopping" in callback["class_path"]
        for callback in saved_config()["trainer"]["callbacks"]
    )
    cli(
        *SFT, *FEW, *flags
    )  # the callback of the first is still in memory, and the name means one class


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
        (
            ["--model.temperature", 0.5],
            "--model.teacher_temperature? That of sampling is --on_policy.generation.temperature",
        ),
        (["configs/sft.yaml"], "did you mean --config configs/sft.yaml?"),
        (["--trainer.callbacks", "EarlyStopping"], "EarlyStopping: the following arguments are re"),
    ],
)
def test_an_option_at_the_wrong_place_is_answered_with_the_right_one(typed, said, fails):
    assert said in fails("fit", "--config", CONFIGS / "gkd.yaml", *typed)
