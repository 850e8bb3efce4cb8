"""The demonstration at a size that teaches nothing: what is shown is that every part is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_kd.comparison.reading import read_experiment
from tests.support.command_line import CONFIGS, run

NAMES = ["teacher_a", "teacher_b", "SFT", "SupervisedKD", "BabyLlama", "GKD", "MiniLLM"]
SIZE = ["--teacher_steps", "2", "--student_steps", "4", "--train_size", "16"]


@pytest.mark.processes
@pytest.mark.slow
def test_the_demo_trains_tests_prints_and_draws(tmp_path):
    command = [sys.executable, "-m", "lightning_kd", "demo", *SIZE]
    done = run(*command, PYTHONPATH=str(CONFIGS.parent), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {}
    for name in NAMES:
        assert name in done.stdout
        place = Path("runs/demo", name, "0")
        assert (place / "student" / "model.safetensors").exists()
        results[name] = json.loads((place / "result.json").read_text())
        assert 0 <= results[name]["metrics"]["test/exact_match"] <= 1
    for title in ("exact match", "KL to teacher_a", "reverse KL", "wall time"):
        assert title in done.stdout
    assert results["teacher_a"]["metrics"]["test/forward_kl"] == pytest.approx(0, abs=1e-7)
    assert results["teacher_b"]["metrics"]["test/forward_kl"] > 0
    steps = {name: result["cost"]["steps"] for name, result in results.items()}
    assert steps == dict.fromkeys(NAMES, 4) | dict.fromkeys(
        ["teacher_a", "teacher_b", "MiniLLM"], 2
    )
    assert Path("runs/demo/curves.png").read_bytes().startswith(b"\x89PNG")
    # Of other options, it says so; nothing is quietly shown that is of another demonstration.
    changed = run(*command, "--train_size", "17", PYTHONPATH=str(CONFIGS.parent))
    assert changed.returncode == 2
    assert "data.init_args.train_size: 16 -> 17" in changed.stderr


def test_the_experiment_is_a_config_too_with_the_commands_defaults():
    said = read_experiment(CONFIGS / "experiments" / "demo.yaml")
    assert [variant.name for variant in said.variants] == NAMES
    defaults = said.placeholders
    for name in ("teacher", "student", "minillm"):
        assert defaults[f"{name}_checks"] == defaults[f"{name}_steps"] // 8
    assert defaults["minillm_steps"] == defaults["student_steps"] // 2


@pytest.mark.processes
def test_help_says_what_each_option_is():
    help_ = subprocess.run(
        [sys.executable, "-m", "lightning_kd", "demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Share of these problems with a wrong answer." in help_
    assert "Make runs anew that are there with other options." in help_
