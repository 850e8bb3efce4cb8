"""Which commands there are, what a run prints, and where it says that everything is."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from lightning_kd.__main__ import main
from lightning_kd.cli.commands import COMMANDS
from lightning_kd.cli.distillation_cli import DistillationCLI
from lightning_kd.cli.main import EXTRA_COMMANDS
from tests.support.command_line import EXPECTED_WARNINGS, fit

pytestmark = EXPECTED_WARNINGS


def type_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lightning-kd", *words])
    main()


def test_the_list_of_commands_is_complete():
    assert set(COMMANDS) == {*DistillationCLI.subcommands(), *EXTRA_COMMANDS}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["trian"]])
def test_every_command_is_listed_to_whoever_asks_or_errs(words, monkeypatch, capsys):
    if words and words[0].startswith("-"):
        type_command(monkeypatch, *words)
        said = capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as end:
            type_command(monkeypatch, *words)
        assert end.value.code == 2
        said = capsys.readouterr().err
    for name, what in COMMANDS.items():
        assert f"lightning-kd {name:10} {what}" in said


def test_a_misspelt_command_comes_with_the_nearest(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        type_command(monkeypatch, "tokeniser")
    assert "no command 'tokeniser'; did you mean tokenizer?" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["trian"]])
def test_nothing_large_is_imported_to_say_which_commands_there_are(words):
    """Importing torch and Lightning takes seconds."""
    code = (
        "import sys\nfrom lightning_kd.__main__ import main\ntry:\n    main()\nexcept SystemExit:\n"
        "    pass\nprint(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


@pytest.mark.processes
def test_the_package_has_its_public_names_when_they_are_asked_for():
    code = (
        "import sys, lightning_kd\nassert 'torch' not in sys.modules\n"
        "from lightning_kd import *\nassert GKD is lightning_kd.GKD\n"
        "assert lightning_kd.modules.GKD is GKD\nassert 'GKD' in dir(lightning_kd)\n"
        "try:\n    lightning_kd.Nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'lightning_kd' has no attribute 'Nothing'\n"


@pytest.mark.command_line
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--model", "SupervisedKDD"],
            "did you mean SupervisedKD? choose BabyLlama or ChunkLikelihoodKD or GKD or ",
        ),
        (["--model", "GKD", "--data", "ChatsData"], "did you mean ChatData? choose ArithmeticData"),
        (
            ["--model.help", "SupervisdKD"],
            "did you mean SupervisedKD? choose BabyLlama or ChunkLikelihoodKD or GKD or ",
        ),
        (["--trainer.callbacks", "EarlyStop"], "did you mean EarlyStopping? choose "),
        (
            ["--trainer.logger", "TensorBoard"],
            "did you mean TensorBoardLogger? choose CSVLogger or ",
        ),
        (["--model", "GKD", "--model.optimizer", "AdmaW"], "did you mean AdamW? choose "),
        (["--model", "GKD", "--model.lr_scheduler", "CosineWarmup"], " or WarmupCosine, or your"),
    ],
)
def test_an_unknown_class_comes_with_the_nearest_and_the_list(flags, said, fails):
    import_module("lightning.pytorch.demos.boring_classes")  # which are nobody's choice
    error = fails("fit", *flags)
    assert said in error
    assert f"there is no class '{flags[-1]}'" in error
    assert "Expected" not in error
    modules = ("DistillationModule", "TeacherModule", "DivergenceModule", "SelfTaughtModule")
    for base in (
        *modules,
        "DistillationData",
        "BaseFinetuning",
        "LightningModule",
        " Callback ",
        "DataPipe",
    ):
        assert base not in error.split("choose")[-1]


@pytest.mark.command_line
@pytest.mark.parametrize("group", ["model", "data"])
def test_help_of_no_class_lists_the_classes(group, cli, capsys):
    with pytest.raises(SystemExit) as end:
        cli("fit", f"--{group}.help")
    said = capsys.readouterr().out
    assert not end.value.code
    one = {"model": "GKD", "data": "ChatData"}[group]
    assert re.match(rf"--{group}.help is of one class: choose .*\b{one}\b.*or your own", said)


@pytest.mark.command_line
@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed")
def test_a_logger_whose_package_is_not_installed_names_it(fails):
    said = fails(*fit("sft", "--trainer.logger", "WandbLogger"))
    assert "Requirement 'wandb" in said
    assert "bool" not in said


@pytest.mark.command_line
def test_a_run_says_where_everything_is_and_what_to_type_next(cli, caplog):
    saving = (
        "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
        "{every_n_train_steps: 1, save_last: true}}]"
    )
    with caplog.at_level("INFO"):
        cli(*fit("sft", "--trainer.enable_checkpointing", "true", "--trainer.callbacks", saving))
    said = [record.getMessage() for record in caplog.records]
    (left,) = [text for text in said if text.startswith("The run is in")]
    assert "checkpoints/last.ckpt, a checkpoint" in left
    assert "tensorboard --logdir runs" in left
    commands = [line.split()[1:] for line in left.splitlines() if "  lightning-kd " in line]
    assert [words[0] for words in commands] == ["validate", "export", "fit"]
    for words in commands:
        cli(*words)
    assert not any("Tip" in text for text in said)


@pytest.mark.command_line
def test_the_progress_bar_shows_neither_an_epoch_of_minus_two_nor_the_runs_number(cli, monkeypatch):
    shown = []

    def add_task(self, *arguments, **options):
        shown.append(str(arguments))

    monkeypatch.setattr("rich.progress.Progress.add_task", add_task)
    from lightning_kd.callbacks import ProgressBar

    metrics = []
    monkeypatch.setattr(
        ProgressBar,
        "get_metrics",
        lambda self, *given, _of=ProgressBar.get_metrics: (
            metrics.append(_of(self, *given)) or metrics[-1]
        ),
    )
    words = [str(word) for word in fit("sft")]
    words.remove("--trainer.enable_progress_bar")
    words.remove("false")
    cli(*shlex.split(" ".join(shlex.quote(word) for word in words)))
    assert any("Epoch 0" in text for text in shown)
    assert not any("/-2" in text for text in shown)
    assert metrics
    assert not any("v_num" in each for each in metrics)
