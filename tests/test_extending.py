"""What docs/extending.md shows is written to files, type-checked and run, as a user would."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_kd import arithmetic_tokenizer
from tests.support.command_line import DEBUG, EXPECTED_WARNINGS, QUIET, SMALL, scalars
from tests.support.toys import tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", TEXT, flags=re.S))
YAMLS = dict(re.findall(r"```yaml\n# (my_lab/\w+\.yaml)\n(.*?)```", TEXT, flags=re.S))
COMMANDS = re.findall(r"```bash\n(lightning-kd .*?)\n```", TEXT)
LOGGED = {
    "chi_squared": "train/divergence",
    "confident_kd": "train/second_moment",
    "smooth_kd": "train/roughness",
    "unigram": "train/divergence",
    "listed": "rollout/length_mean",
    "first_character": "val/first_character",
}


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """The files of the page, where they can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").touch()
    for name, text in {**FILES, **YAMLS}.items():
        (tmp_path / name).write_text(text)
    # What was imported stays: jsonargparse keeps classes that it has parsed, and imports them again.
    return tmp_path


def test_every_example_is_short_and_imports_no_private_name():
    assert {Path(name).stem for name in FILES} == set(LOGGED)
    for text in FILES.values():
        assert len(text.splitlines()) <= 60
        imports = re.findall(r"^(?:from|import) (.*)$", text, flags=re.M)
        assert not any(re.search(r"\b_\w", line) for line in imports)


@pytest.mark.processes
def test_the_examples_type_check(my_lab):
    cache = ROOT / ".mypy_cache"
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "my_lab"],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: shlex.split(text)[3])
def test_every_command_runs_and_logs_what_it_adds(cli, my_lab, command):
    tokenizer = arithmetic_tokenizer()
    teacher = tiny_llama(1, vocab_size=len(tokenizer))
    teacher.save_pretrained("runs/teacher")
    tokenizer.save_pretrained("runs/teacher")
    Path("counts.json").write_text(json.dumps({"3": 5, "4": 2, "5": 1, "6": 1, "7": 1}))
    words = [str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(command)[1:]]
    words += ["--model.student.config", SMALL]
    if "supervised_kd" in command:
        words += ["--model.teacher.name_or_path", "runs/teacher"]
    cli(*words[:3], *DEBUG, *QUIET, *words[3:])
    (stem,) = [Path(name).stem for name in FILES if Path(name).stem in command]
    names = scalars("runs").scalars
    assert LOGGED[stem] in names.Keys()
    for name in names.Keys():
        assert all(abs(event.value) < float("inf") for event in names.Items(name)), name
    if stem == "listed":
        rows = [json.loads(line) for line in Path("rollouts.jsonl").read_text().splitlines()]
        on_policy = yaml.safe_load(YAMLS["my_lab/listed.yaml"])["on_policy"]
        listed = on_policy["engine"]["init_args"]["completions"]
        assert {tuple(row["completion_ids"]) for row in rows} == set(map(tuple, listed))
        assert all(row["ended"] == (row["completion_ids"][-1] == 1) for row in rows)
