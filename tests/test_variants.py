"""The commands of docs/variants.md run, and log what it says."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_kd import arithmetic_tokenizer
from tests.support.command_line import DEBUG, EXPECTED_WARNINGS, QUIET, SMALL, scalars
from tests.support.toys import tiny_llama

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.command_line]

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "variants.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"```bash\nlightning-kd (.*?)\n```", PAGE)]
LOGGED = {
    "--model.interpolation": "train/interpolation",
    "--model.position_share": "train/tokens",
    "--model.reference": "train/policy_gradient",
    "--on_policy.engine": "rollout/length_mean",
    "--on_policy.replay": "rollout/replay_buffer",
}
"""What shows that an option has had an effect, by the option."""


def option_of(command):
    (found,) = {part for part in command if part in LOGGED}
    return found


def test_every_command_is_known_by_what_it_logs():
    assert sorted(map(option_of, COMMANDS)) == sorted(LOGGED)


@pytest.mark.parametrize("command", COMMANDS, ids=option_of)
def test_the_command_runs_and_logs_its_quantity(cli, teacher, command):
    name, *options = command
    tiny_llama(2, vocab_size=14).save_pretrained("runs/student")
    arithmetic_tokenizer().save_pretrained("runs/student")
    (Path.cwd() / "configs").symlink_to(Path(__file__).resolve().parents[1] / "configs")
    small = ["--data.batch_size", 4, "--data.validation_size", 8]
    small += ["--model.teacher.name_or_path", teacher]
    if "configs/on_policy_distillation.yaml" not in options:
        small += ["--model.student.config", SMALL]
    cli(name, *options, *DEBUG, *QUIET, *small)
    assert LOGGED[option_of(command)] in scalars("runs").Tags()["scalars"]
