"""``lightning-kd compare`` as a user types it, killed and typed again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, SMALL, run

pytestmark = EXPECTED_WARNINGS
ROOT = CONFIGS.parent
TINY = {
    "model": {
        "class_path": "SFT",
        "init_args": {
            "student": {"config": yaml.safe_load(SMALL)},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {
        "class_path": "ArithmeticData",
        "init_args": {"batch_size": 4, "train_size": 40, "validation_size": 8, "test_size": 8},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 2, "save_last": True},
            }
        ],
    },
}
OF_SFT = {
    "model": {
        "class_path": "GKD",
        "init_args": {"teacher": {"name_or_path": "{SFT}"}},
    },
    "on_policy": {"generation": {"max_new_tokens": 5}, "path": "{written}_{seed}.jsonl"},
}
OF_KD = {"model": {"class_path": "SupervisedKD", "init_args": {"teacher": {"name_or_path": "t"}}}}
EXPERIMENT = {
    "title": "Two runs",
    "placeholders": {"written": "where completions go"},
    "common": TINY,
    "runs": {"SFT": {}, "GKD": OF_SFT},
    "metrics": {"test/bits_per_byte": "lower"},
    "curves": {"val/loss": {}},
}


def command(*words):
    return [sys.executable, "-m", "lightning_kd", "compare", *map(str, words)]


def write(**changes):
    Path("tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT | changes))
    return ["--config", "tiny.yaml", "--set", "written=generated"]


def calm(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def result(place):
    return json.loads(Path(place, "result.json").read_text())


def until(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def same_run(one, other):
    """Bit for bit, but for what a clock or the system says."""
    assert one["metrics"] == other["metrics"]
    for name in ("steps", "tokens", "generated_tokens"):
        assert one["cost"][name] == other["cost"][name]


def stopping():
    """What is common to runs that wait where the test wants them to."""
    common = json.loads(json.dumps(TINY))
    common["trainer"]["callbacks"].append({"class_path": "tests.comparison.places.Waiting"})
    return common


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where four runs have been made, and what was said."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    words = command("--config", "tiny.yaml", "--set", "written=generated", "--seeds", 0, 1)
    done = subprocess.run(
        words, env=calm(), cwd=folder, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def whole(made):
    """What runs come to that nobody ends."""
    return {name: result(made[0] / "runs" / "tiny" / name / "0") for name in ("SFT", "GKD")}


@pytest.mark.processes
@pytest.mark.slow
def test_runs_are_made_once_and_shown(made, tmp_path, cli, fails, capsys):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    words = [*write(), "--seeds", 0, 1]
    lines = [line for line in made[1].splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in lines] == [
        "[1/4] SFT, seed 0",
        "[2/4] GKD, seed 0",
        "[3/4] SFT, seed 1",
        "[4/4] GKD, seed 1",
    ]
    assert lines[-1].endswith("none left")
    for seed in (0, 1):
        made = result(f"runs/tiny/GKD/{seed}")
        written = Path(f"generated_{seed}.jsonl").read_text().splitlines()
        tokens = sum(len(json.loads(line)["completion_ids"]) for line in written)
        assert made["cost"]["generated_tokens"] == made["cost"]["tokens"] == tokens
        assert made["cost"]["steps"] == 8
        assert 0 < made["cost"]["seconds"] < made["cost"]["wall_seconds"]
        assert result(f"runs/tiny/SFT/{seed}")["cost"]["generated_tokens"] == 0
    page = Path("runs/tiny/report.md").read_text()
    means = [result(f"runs/tiny/SFT/{seed}")["metrics"]["test/bits_per_byte"] for seed in (0, 1)]
    assert f"| SFT | {sum(means) / 2:.4g} ± " in page
    # Nothing is made again; a changed option is said, and made anew where that is asked for.
    before = Path("runs/tiny/SFT/0/fit.json").stat().st_mtime_ns
    cli("compare", *words)
    assert "4 runs in runs/tiny, 4 of them there" in capsys.readouterr().out
    changed = json.loads(json.dumps(EXPERIMENT["common"]))
    changed["trainer"]["max_steps"] = 6
    words = [*write(common=changed), "--seeds", 0]
    refused = fails("compare", *words)
    assert "SFT, seed 0 (runs/tiny/SFT/0): trainer.max_steps: 8 -> 6" in refused
    assert "GKD, seed 0" in refused
    assert Path("runs/tiny/SFT/0/fit.json").stat().st_mtime_ns == before
    Path("generated_0.jsonl").unlink()
    anew = run(*command(*words, "--rerun_changed"), **calm())
    assert anew.returncode == 0, anew.stdout + anew.stderr
    assert result("runs/tiny/GKD/0")["cost"]["steps"] == 6


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_comparison_that_was_ended_goes_on_where_it_was(number, whole, fails):
    words = write(common=stopping(), runs={"GKD": OF_SFT, "SFT": {}})
    Path("wait").touch()
    with Path("said").open("w") as said:
        process = subprocess.Popen(command(*words), env=calm(), stdout=said, stderr=said)
        until(Path("step_6").exists)
        assert f"another comparison (process {process.pid})" in fails("compare", *words)
        process.send_signal(number)
        if number != signal.SIGKILL:
            time.sleep(0.2)
            Path("wait").unlink()
        code = process.wait(120)
    text = Path("said").read_text()
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number, text
        assert "Stopped; go on with: lightning-kd compare --config tiny.yaml" in text
    saved = Path("runs/tiny/SFT/0/checkpoints/last.ckpt")
    assert saved.exists()
    assert not Path("runs/tiny/SFT/0/result.json").exists()
    Path("wait").unlink(missing_ok=True)
    done = run(*command(*words), **calm())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--ckpt_path" in Path("runs/tiny/SFT/0/log.txt").read_text()
    for name in ("SFT", "GKD"):
        same_run(result(f"runs/tiny/{name}/0"), whole[name])


@pytest.mark.processes
@pytest.mark.slow
def test_two_runs_at_once_come_to_the_same_are_both_saved_and_both_go_on(whole):
    meeting = {"class_path": "tests.comparison.places.Meeting", "init_args": {"runs": 2}}
    common = json.loads(json.dumps(TINY))
    common["trainer"]["callbacks"].append(meeting)
    words = [*write(common=common, runs={"GKD": OF_SFT, "SFT": {}}), "--seeds", 0, 1, "--jobs", 2]
    Path("wait").touch()
    with Path("said").open("w") as said:
        process = subprocess.Popen(command(*words), env=calm(), stdout=said, stderr=said)
        # Both are SFT's: GKD reads its student.
        until(lambda: Path("met").exists() and len([*Path("met").iterdir()]) == 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        Path("wait").unlink()
        code = process.wait(120)
    assert code == 128 + signal.SIGTERM, Path("said").read_text()
    for seed in (0, 1):
        assert Path(f"runs/tiny/SFT/{seed}/checkpoints/last.ckpt").exists()
        assert not Path(f"runs/tiny/SFT/{seed}/result.json").exists()
        assert not Path(f"runs/tiny/GKD/{seed}").exists()
    done = run(*command(*words), **calm())
    assert done.returncode == 0, done.stdout + done.stderr
    places = [line.split("]")[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert places == ["[1/4", "[2/4", "[3/4", "[4/4"]
    for name in ("SFT", "GKD"):
        same_run(result(f"runs/tiny/{name}/0"), whole[name])
    for seed in (0, 1):
        assert "--ckpt_path" in Path(f"runs/tiny/SFT/{seed}/log.txt").read_text()
        assert result(f"runs/tiny/SFT/{seed}")["jobs"] == 2


@pytest.mark.processes
@pytest.mark.slow
def test_a_budget_of_time_goes_on_where_it_was(tmp_path):
    budgets = {"time": {"trainer": {"max_time": "00:00:00:04", "max_steps": -1}}}
    words = write(common=stopping(), runs={"SFT": {}}, budgets=budgets)
    Path("wait").touch()
    with Path("said").open("w") as said:
        process = subprocess.Popen(command(*words), env=calm(), stdout=said, stderr=said)
        until(Path("step_6").exists)
        time.sleep(2)  # of the four
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        Path("wait").unlink()
        assert process.wait(120) == 128 + signal.SIGTERM, Path("said").read_text()
    done = run(*command(*words), **calm())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--ckpt_path" in Path("runs/tiny/time/SFT/0/log.txt").read_text()
    cost = result("runs/tiny/time/SFT/0")["cost"]
    assert cost["steps"] > 7
    assert 3.9 < cost["wall_seconds"] < 5.5  # six and more, had the time begun anew


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_reported_and_the_others_are_made(jobs, tmp_path):
    failing = {"trainer": {"callbacks+": [{"class_path": "tests.comparison.places.Failing"}]}}
    read = {"model": {"init_args": {"student": {"name_or_path": "{Bad}"}}}}
    words = write(runs={"Bad": failing, "After": read, "Good": {}})
    threads = min(2, len(os.sched_getaffinity(0)))
    done = run(*command(*words, "--jobs", jobs), **calm(OMP_NUM_THREADS=f"{threads}"))
    assert done.returncode == 1
    assert "Bad, seed 0: fit failed: RuntimeError: a defect in the middle" in done.stdout
    assert "(runs/tiny/Bad/0/log.txt)" in done.stdout
    assert "After, seed 0: not started, because Bad, seed 0 failed" in done.stdout
    assert "2 of 3 runs failed" in done.stdout
    assert result("runs/tiny/Good/0")["cost"]["steps"] == 8
    assert result("runs/tiny/Good/0")["device"] == f"cpu, {max(1, threads // jobs)} threads"
    assert "| Good |" in Path("runs/tiny/report.md").read_text()
    Path("mended").touch()
    if jobs == 1:
        again = run(*command(*words), **calm())
        assert again.returncode == 0, again.stdout + again.stderr
        assert "3 runs in runs/tiny, 1 of them there" in again.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_a_metric_that_never_comes_is_a_failure_that_lists_what_came(tmp_path):
    # What a callback of one's own logs is not known before.
    common = json.loads(json.dumps(TINY))
    common["trainer"]["callbacks"].append({"class_path": "tests.comparison.places.Waiting"})
    words = write(common=common, runs={"SFT": {}}, metrics={"test/bleu": "higher"})
    done = run(*command(*words), **calm())
    assert done.returncode == 1
    assert "its test gave no test/bleu; it gave test/" in done.stdout


@pytest.mark.processes
@pytest.mark.slow
def test_a_tokenizer_is_learned_once_before_the_runs_that_read_it(fails):
    Path("text.txt").write_text("one two three and four " * 200)
    common = json.loads(json.dumps(TINY))
    common["data"] = {
        "class_path": "PackedTextData",
        "init_args": {"tokenizer": "{bpe}", "train": "{written}", "test": "{written}"},
    }
    common["data"]["init_args"] |= {"block_length": 16, "batch_size": 4}
    common["trainer"] |= {"max_steps": 2, "limit_test_batches": 2, "val_check_interval": None}
    learned = {"bpe": {"files": "{written}", "vocab_size": 264}}
    learned["unread"] = {"files": "gone.txt"}
    said = {"common": common, "runs": {"SFT": {}}, "tokenizers": learned}
    write(**said)
    words = ["--config", "tiny.yaml", "--set", "written=text.txt"]
    done = run(*command(*words), **calm())
    assert done.returncode == 0, done.stdout + done.stderr
    (place,) = Path("runs/tiny/tokenizers").iterdir()
    assert f"264 tokens, learned from 1 text, are in {place}" in done.stdout
    own = AutoTokenizer.from_pretrained("runs/tiny/SFT/0/student").get_vocab()
    assert len(own) == 264
    assert own == AutoTokenizer.from_pretrained(place).get_vocab()
    # It is not learned again; another one makes the run another.
    again = run(*command(*words, "--seeds", 0, 1), **calm())
    assert again.returncode == 0, again.stdout + again.stderr
    assert "learned" not in again.stdout
    learned["bpe"]["vocab_size"] = 262
    write(**said)
    refused = fails("compare", *words)
    assert f"data.init_args.tokenizer: {place} -> runs/tiny/tokenizers/bpe-" in refused
    assert [*Path("runs/tiny/tokenizers").iterdir()] == [place]


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, ["--seeds", 0, 0], "give each seed once"),
        ({}, ["--jobs", 0], "--jobs 0: give a number of runs at once, from 1 on"),
        ({}, ["--quick"], "tiny says no smaller sizes"),
        ({}, ["--set", "writen=x"], "no placeholder 'writen'; did you mean written"),
        ({}, ["--write", "gone.md"], "there is no page gone.md"),
        ({}, ["--configs", "tiny.yaml"], "give --config with an experiment file, or --configs"),
        ({}, ["--configs", "gone.yaml"], "--configs gone.yaml: there is no file gone.yaml"),
        ({}, ["--output_dir", "x"], "did you mean"),
        ({"runs": {"A": {"model": {"class_path": "SFTT"}}}}, [], "did you mean SFT?"),
        (
            {"runs": {"A": {"trainer": {"max_step": 3}}}},
            [],
            "run A: Subcommand 'fit' does not accept option 'trainer.max_step'",
        ),
        (
            {"runs": {"A": {"model": {"init_args": {"optimizer": {"init_args": {"lr": "x"}}}}}}},
            [],
            "run A: ",
        ),
        ({"placeholders": {"written": "", "data": "texts"}}, [], "--set data=...  texts"),
        ({"tokenizers": {"bpe": {"vocab_size": 300}}}, [], "arguments are required: files"),
        (
            {"metrics": {"test/loss": "lower"}},
            [],
            "test/loss of SFT (SFT) and GKD (GKD) are different formulas",
        ),
        (
            {
                "runs": {
                    "A": OF_KD,
                    "B": OF_KD | {"test": {"model": {"init_args": {"alpha": 0.9}}}},
                },
                "metrics": {"test/loss": "lower"},
            },
            [],
            "test/loss of A (alpha: 0.5) and B (alpha: 0.9) are different formulas",
        ),
        (
            {"runs": {"SFT": {}}, "metrics": {"test/exact_math": "higher"}},
            [],
            "the test of SFT will give no test/exact_math",
        ),
        (
            {
                "runs": {
                    "SFT": {
                        "test": {"trainer": {"callbacks": [{"class_path": "CompletionSamples"}]}}
                    }
                },
                "metrics": {"test/exact_math": "higher"},
            },
            [],
            "did you mean test/exact_match?",
        ),
        (
            {"runs": {"SFT": {}}, "curves": {"val/nothing": {}}},
            [],
            "curves: no run will log val/nothing; their validations can log val/",
        ),
        (
            {"runs": {"SFT": {}}, "metrics": {"test/perplexityy": "lower"}},
            [],
            "did you mean test/perplexity?",
        ),
        (
            {"runs": {"SFT": {}}, "metrics": {"test/forward_kl": "lower"}},
            [],
            "the test of SFT will give no test/forward_kl",
        ),
        (
            {
                "runs": {
                    "KD": OF_KD
                    | {"variations": {"model.init_args.divergence": ["forward_kl", "nonsense_kl"]}}
                }
            },
            [],
            "run KD-nonsense_kl: ",
        ),
        ({"runs": {"A": {"data": {"init_args": {"batch_size": 0}}}}}, [], "run A: batch_size is 0"),
        (
            {"runs": {"A": {"model": {"init_args": {"optimizer": {"init_args": {"lr": -1.0}}}}}}},
            [],
            "run A: ",
        ),
        (
            {
                "runs": {
                    "A": {
                        "trainer": {
                            "callbacks+": [
                                {"class_path": "CompletionSamples", "init_args": {"batches": 0}}
                            ]
                        }
                    }
                }
            },
            [],
            "batches is 0; give 1 or more",
        ),
    ],
)
def test_what_could_not_be_run_is_refused_before_anything_begins(changes, more, message, fails):
    assert message in fails("compare", *write(**changes), *more)
    assert not Path("runs").exists()
