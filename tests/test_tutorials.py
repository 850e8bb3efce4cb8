"""The scripts of docs/tutorials run as they stand; their pages show them and what they print."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kd import GKD, Completions, PromptCompletionData, Prompts, SamplingOptions
from lightning_kd.callbacks import OnPolicyGeneration
from tests.support.command_line import EXPECTED_WARNINGS, QUIET
from tests.support.harness import GradientProbe, trainer
from tests.support.options import is_option

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
NAMES = sorted(path.stem for path in TUTORIALS.glob("*.py"))
NUMBER = r"\d+(?:\.\d+)?"
TOLERANCES = {
    # Another CPU rounds otherwise, and then samples other tokens here and there.
    "chat_model": {"rel": 0, "abs": 0},
    "diagnostics": {"rel": 0.25, "abs": 0.2},
    "gkd_step": {"rel": 0.25, "abs": 0.005},
    "served_teacher": {"rel": 0.01, "abs": 0},
}


def page(name):
    return (TUTORIALS / f"{name}.md").read_text()


def blocks(name, language, before=""):
    return re.findall(rf"{before}```{language}\n(.*?)```", page(name), flags=re.S)


def lines(text):
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_whole_script(name):
    script = (TUTORIALS / f"{name}.py").read_text()
    assert lines("\n".join(blocks(name, "python"))) == lines(script)


def test_every_script_has_a_page_that_is_listed():
    listed = re.findall(r"\]\((\w+)\.md\)", page("index"))
    pages = {path.stem for path in TUTORIALS.glob("*.md")} - {"index"}
    assert sorted(pages) == sorted(listed) == NAMES == sorted(TOLERANCES)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_the_script_prints_what_the_page_says(name, tmp_path):
    done = subprocess.run(
        [sys.executable, TUTORIALS / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = lines("".join(blocks(name, "text", before="<!-- output -->\n\n")))
    printed = lines(done.stdout)
    assert [re.split(NUMBER, line) for line in printed] == [
        re.split(NUMBER, line) for line in shown
    ]
    ours, theirs = (
        [float(number) for line in side for number in re.findall(NUMBER, line)]
        for side in (printed, shown)
    )
    assert ours == pytest.approx(theirs, **TOLERANCES[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_page_is_one(name):
    commands = "\n".join(blocks(name, "text"))
    fit = [line for line in commands.splitlines() if re.match("lightning-kd (fit|check)", line)]
    prose = re.sub(r"```.*?```", "", page(name), flags=re.S)
    named = re.findall(r"`(--[\w.]+)[^`]*`", prose)
    for option in [*re.findall(r"--[\w.]+", "\n".join(fit)), *named]:
        assert is_option(option) or option == "--host", option


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "yaml")])
def test_the_yaml_of_the_page_is_a_config(name, cli, capsys):
    (text,) = blocks(name, "yaml")
    Path("own.yaml").write_text(text)
    start = ["--config", ROOT / "configs" / "sft.yaml"] if "model:" not in text else []
    with pytest.raises(SystemExit) as exit_:
        cli("fit", *start, "--config", "own.yaml", *QUIET, "--print_config")
    assert exit_.value.code in {0, None}
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(text)["trainer"]["callbacks"][0]["class_path"]
    assert printed["trainer"]["callbacks"][0]["class_path"].endswith(f".{given}")


# GKD step by step: the same gradient as the module's, on rows that the module's callback has sampled.


@pytest.fixture
def script():
    """Names of the script, without the steps that it takes."""
    text = (TUTORIALS / "gkd_step.py").read_text()
    assert len(lines(text)) <= 60
    names: dict = {}
    exec(compile(text.partition("torch.manual_seed(0)")[0], "gkd_step.py", "exec"), names)
    return names


@pytest.fixture
def models(script):
    torch.manual_seed(0)
    return script["make_model"](16, 0.1), script["make_model"](32, 0.2)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_module(script, models):
    student, teacher = models
    rows = [{"prompt": f"{n}+{n * n}=", "completion": "0"} for n in range(6)]
    data = PromptCompletionData(train=rows, tokenizer=script["tokenizer"], batch_size=3)
    sampling = SamplingOptions(max_new_tokens=8)
    probe = GradientProbe()
    callbacks = [OnPolicyGeneration(generation=sampling, path="rollouts.jsonl"), probe]
    fit = trainer(max_steps=1, accumulate_grad_batches=2, callbacks=callbacks)
    module = GKD(
        student=copy.deepcopy(student),
        teacher=copy.deepcopy(teacher),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0),
    )
    fit.fit(module, datamodule=data)

    written = [json.loads(line) for line in Path("rollouts.jsonl").read_text().splitlines()]
    assert len({len(row["prompt_ids"]) for row in written}) > 1
    assert len({len(row["completion_ids"]) for row in written}) > 1
    end, pad = script["END"], script["PAD"]
    total, count = 0.0, 0.0
    for part in (written[:2], written[2:]):  # other micro-batches than the module's
        longest = max(len(row["prompt_ids"]) for row in part)
        blank = [longest - len(row["prompt_ids"]) for row in part]
        ids = [[pad] * n + row["prompt_ids"] for n, row in zip(blank, part, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in blank]
        prompts = Prompts(torch.tensor(ids), torch.tensor(mask), frozenset({end}), pad)
        tokens = [row["completion_ids"] for row in part]
        completions = Completions.of_tokens(tokens, eos_ids={end}, pad_id=pad)
        loss, scored = script["summed_loss"](student, teacher, prompts, completions)
        loss.backward()
        total, count = total + loss.item(), count + scored.item()
    gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()]) / count
    torch.testing.assert_close(probe.gradient, gradient, rtol=1e-4, atol=1e-7)
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(total / count, rel=1e-5)
    assert count == sum(len(row["completion_ids"]) for row in written)


def test_a_completion_depends_on_its_prompt_and_seed_alone(script, models):
    student, _ = models
    texts, seeds = ["1+2=", "30+4=", "555+6="], [7, 8, 9]
    _, together = script["generate"](student, texts, seeds)
    for row in range(3):
        _, alone = script["generate"](student, [texts[row]], [seeds[row]])
        assert (
            alone.ids[0][alone.mask[0]].tolist() == together.ids[row][together.mask[row]].tolist()
        )
