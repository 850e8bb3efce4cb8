"""What tests of the command line share."""

import os
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2}"
)
DEBUG = ["--config", str(CONFIGS / "overlays" / "debug.yaml")]
FROM_CACHE = ["--config", str(CONFIGS / "overlays" / "cached_teacher.yaml")]
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]

EXPECTED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # What a user sees who goes on in an old folder: right, and no defect.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def fit(config, *more):
    path = CONFIGS / f"{config}.yaml"
    return ["fit", "--config", path, *DEBUG, *QUIET, "--model.student.config", SMALL, *more]


def scalars(directory):
    (run,) = Path(directory).glob("version_*")
    seen = EventAccumulator(str(run), size_guidance={"scalars": 0})
    seen.Reload()
    return seen


def assert_equal_runs(one, other):
    """What two folders with a run and its ``student`` each have come to."""
    students = [
        AutoModelForCausalLM.from_pretrained(f"{folder}/student") for folder in (one, other)
    ]
    for a, b in zip(*(student.parameters() for student in students), strict=True):
        # AdamW divides by the size of a gradient: where it is all rounding, so is the step.
        assert (a - b).abs().max() < 1e-4
    first, second = scalars(one), scalars(other)
    names = ["train/loss", "train/grad_norm", "train/tokens", "rollout/length_mean"]
    for name in (*names, "val/loss", "val/forward_kl"):
        expected = [event.value for event in first.Scalars(name)]
        assert [event.value for event in second.Scalars(name)] == pytest.approx(expected, rel=1e-5)


def run(*command, **environment):
    """A process of its own, as a user starts it."""
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
