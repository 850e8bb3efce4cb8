"""What docs/troubleshooting.md names exists: options, logged names, mismatches, classes."""

import re
import shlex
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import torch
import yaml

import lightning_kd
import lightning_kd.callbacks
import lightning_kd.modules
from lightning_kd import GKD, OnPolicyDistillation, SamplingOptions, SupervisedKD, TopKTeacher
from lightning_kd.callbacks import (
    CompletionSamples,
    LossNormalizationDiagnostics,
    NonFiniteGuard,
    OnPolicyGeneration,
    OwnCompletions,
    TokensPerSecond,
)
from lightning_kd.modules import CorrectedTopK
from lightning_kd.preflight.findings import MISMATCHES
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.harness import Letters, trainer
from tests.support.options import is_option
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.S)
CODE = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = re.findall(r"```bash\n(lightning-kd .*?)\n```", PAGE, flags=re.S)
LOGGED = r"(?:train|val|rollout|norm)/\w+"
TABLES = {"val/samples"}
"""Texts, which go to loggers that can show them."""


def test_every_option_exists():
    named = {o for text in (*CODE, *COMMANDS) for o in re.findall(r"--[a-z_][\w.]*", text)}
    assert len(named) > 40
    assert {name for name in named if not is_option(name)} == {"--student"}  # of evaluate


def test_what_is_no_option_is_found():
    for name in ("model.teacher.place", "model.lr", "on_policy.lambda", "optimizer.lr", "data.lr"):
        assert not is_option(f"--{name}"), name
    for name in ("model.optimizer.lr", "on_policy.lmbda.steps", "trainer.strategy.timeout"):
        assert is_option(f"--{name}"), name


def test_every_mismatch_of_the_check_exists():
    named = re.findall(r"((?:`\w+`(?:, | and )?)+) of `check`", PROSE)
    names = {name for text in named for name in re.findall(r"\w+", text)} - {"and"}
    assert {"template", "endless", "eos_untrained"} <= names <= MISMATCHES.keys()


def test_every_class_exists():
    named = {text for text in CODE if re.fullmatch(r"(?:[A-Z]\w*[a-z]\w*)+", text)}
    parts = (lightning_kd, lightning_kd.callbacks, lightning_kd.modules)
    homes = (*parts, lightning.pytorch.callbacks, lightning.pytorch, lightning_kd.divergences)
    assert len(named) > 10
    assert {name for name in named if not any(hasattr(home, name) for home in homes)} == set()


def test_every_symptom_is_in_the_list_at_the_top():
    listed = set(re.findall(r"\]\(#([\w-]+)\)", PAGE.partition("\n## ")[0]))
    titles = re.findall(r"^## (.*)$", PAGE, flags=re.M)
    assert listed == {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def logged_by(module, *callbacks):
    fit = trainer(max_steps=4, max_epochs=2, limit_val_batches=1, callbacks=[*callbacks])
    fit.fit(module, datamodule=Letters(batch_size=4))
    return set(fit.callback_metrics)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optimizer step .* was skipped")
@pytest.mark.filterwarnings("ignore:the .* gives .* of its probability to tokens beyond")
def test_every_logged_name_is_logged():
    rollouts = SamplingOptions(max_new_tokens=6)
    logged = logged_by(
        GKD(student=tiny_llama(0), teacher=tiny_llama(1, vocab_size=20), vocabulary="shared"),
        LossNormalizationDiagnostics(),
        CompletionSamples(max_new_tokens=6),
        OwnCompletions(prompts=2, max_new_tokens=6),
        TokensPerSecond(),
        OnPolicyGeneration(generation=rollouts),
    )
    logged |= logged_by(
        GKD(student=tiny_llama(0, vocab_size=20), teacher=tiny_llama(1), vocabulary="shared")
    )
    logged |= logged_by(
        OnPolicyDistillation(
            student=tiny_llama(0),
            teacher=TopKTeacher(teacher=tiny_llama(1), k=16),
            estimator=CorrectedTopK(),
        ),
        OnPolicyGeneration(generation=rollouts),
    )
    too_far = SupervisedKD(
        student=tiny_llama(0),
        teacher=tiny_llama(1),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=1e30),
    )
    logged |= logged_by(too_far, NonFiniteGuard("skip"))
    named = {text for text in CODE if re.fullmatch(LOGGED, text)}
    assert len(named) > 40
    assert named - TABLES - logged == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_read(command, cli, capsys, monkeypatch):
    words = [str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(command)[1:]]
    with pytest.raises(SystemExit) as exit_:
        cli(*words, "--print_config")
    assert exit_.value.code in {0, None}
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert strategy["class_path"].endswith("DDPStrategy")
    assert strategy["init_args"]["timeout"] == "0:05:00"
