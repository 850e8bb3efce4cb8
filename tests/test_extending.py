"""What docs/extending.md shows is written to files, type-checked and run, as a user would."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_kd import (
    ArithmeticData,
    LocalTeacher,
    StudentSpec,
    TopKTeacher,
    arithmetic_tokenizer,
)
from tests.support.command_line import DEBUG, EXPECTED_WARNINGS, QUIET, SMALL, scalars
from tests.support.harness import fit_one_step
from tests.support.toys import ragged_batch, tiny_llama

pytestmark = EXPECTED_WARNINGS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", TEXT, flags=re.S))
TESTS = {name for name in FILES if Path(name).stem.startswith("test_")}
YAMLS = dict(re.findall(r"```yaml\n# (my_lab/\w+\.yaml)\n(.*?)```", TEXT, flags=re.S))
COMMANDS = re.findall(r"```bash\n(lightning-kd .*?)\n```", TEXT)
LOGGED = {
    "chi_squared": "train/divergence",
    "confident_kd": "train/second_moment",
    "smooth_kd": "train/roughness",
    "hidden_kd": "train/hidden",
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
    assert {Path(name).stem for name in FILES.keys() - TESTS} == set(LOGGED)
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


@pytest.mark.parametrize("name", TESTS)
def test_a_test_of_the_page_passes(my_lab, name):
    torch.manual_seed(0)
    tests = [f for n, f in vars(import_file(name)).items() if n.startswith("test_")]
    assert tests
    for test in tests:
        test()


def import_file(name):
    return import_module(name.removesuffix(".py").replace("/", "."))


def test_the_divergence_of_the_page_is_finite_where_both_exclude_a_token(my_lab):
    divergence = import_file("my_lab/chi_squared.py").ChiSquared()
    q, p = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.9, 0.0, 0.0])
    z = torch.tensor([1.0, -0.5, 0.25, -torch.inf], dtype=torch.float64, requires_grad=True)
    t = torch.from_numpy(p).log()
    with np.errstate(divide="ignore"):
        value = divergence(torch.from_numpy(np.log(q)), t)
    assert value.item() == pytest.approx(0.1**2 / 0.5 + 0.9**2 / 0.3 - 1)
    divergence(z.log_softmax(-1), t).backward()
    soft = np.exp([1.0, -0.5, 0.25]) / np.exp([1.0, -0.5, 0.25]).sum()
    ratio = p[:3] ** 2 / soft  # whose sum over v has the gradient q_i sum_v r_v - r_i in the logits
    np.testing.assert_allclose(z.grad[:3], soft * ratio.sum() - ratio, rtol=1e-12)
    assert z.grad[3] == 0
    assert divergence(t, t) == 0


def test_the_method_of_the_page_learns_from_k_tokens_too(my_lab):
    method = import_file("my_lab/confident_kd.py").ConfidentKD
    teacher = TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=3)
    module = method(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    fit_one_step(module, [ragged_batch([(2, 5), (1, 3)])])
    module.needs = ("full_distribution",)
    with pytest.raises(ValueError, match=r"one of your own says in its class .* \(needs\)"):
        fit_one_step(module, [ragged_batch([(2, 5), (1, 3)])])


def test_the_hidden_states_of_the_page_are_the_last_ones_and_its_projection_trains(my_lab):
    batch = ragged_batch([(2, 5), (1, 3)])
    module = import_file("my_lab/hidden_kd.py").HiddenKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        student_width=tiny_llama(0).config.hidden_size,
        teacher_width=tiny_llama(1).config.hidden_size,
    )
    start = copy.deepcopy(module.projection)
    fit_one_step(module, [batch])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, target = (
        tiny_llama(seed)(**inputs, output_hidden_states=True).hidden_states[-1][:, :-1]
        for seed in (0, 1)
    )
    scored = batch["labels"][:, 1:] != -100
    expected = (start(own[scored]) - target[scored]).square().mean(-1)
    hidden = module.micro_batch_loss.terms["hidden"].values
    torch.testing.assert_close(hidden, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(module.projection.weight, start.weight)


def test_all_answers_of_the_arithmetic_task_have_five_tokens():
    data = ArithmeticData(train_size=50, validation_size=50)
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader()
    counts = [(b["labels"] != -100).sum(1) for loader in loaders for b in loader]
    assert {count for batch in counts for count in batch.tolist()} == {5}


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
