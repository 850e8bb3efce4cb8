"""The experiments of the repository, at their smaller size, and their pages."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.comparison.test_command import calm, command
from tests.support.command_line import CONFIGS, EXPECTED_WARNINGS, run

pytestmark = EXPECTED_WARNINGS
ROOT = CONFIGS.parent


@pytest.mark.parametrize("name", ["normalization_arithmetic"])
@pytest.mark.processes
@pytest.mark.slow
def test_an_experiment_of_the_repository_runs_at_its_smaller_size(name, tmp_path):
    words = ["--config", CONFIGS / "experiments" / f"{name}.yaml", "--quick"]
    done = run(*command(*words), **calm())
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(f"runs/{name}_quick/curves.png").exists()


@pytest.mark.parametrize(
    "name", ["stories", "data", "normalization", "babyllama", "other_tokenizer"]
)
@pytest.mark.processes
@pytest.mark.slow
def test_an_experiment_on_real_text_runs_at_its_smaller_size(name, shared_data):
    place = CONFIGS / "experiments" / f"{name}.yaml"
    said = yaml.safe_load(place.read_text())
    if name == "stories":
        # Its second budget is one of time, and at the smaller size all of them end after four steps.
        del said["budgets"]["equal_time"]
        place = Path("stories.yaml")
        place.write_text(yaml.safe_dump(said))
    words = command("--config", place, "--quick", "--set", f"data={shared_data}", "--jobs", 2)
    done = subprocess.run(
        words, env=calm(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(Path(f"runs/{name}_quick/report.json").read_text())
    assert {*made["claims"]} == {*said.get("budgets", [""])}
    for found in made["claims"].values():
        assert [each["claim"]["run"] for each in found] == [each["run"] for each in said["claims"]]


def test_a_tokenizer_is_learned_when_all_runs_have_been_parsed(fails):
    words = ["--config", CONFIGS / "experiments" / "babyllama.yaml", "--set", "data=none"]
    message = "tokenizers.bpe: the data file 'none/eltec/train.jsonl' does not exist"
    assert message in fails("compare", *map(str, words))


@pytest.mark.parametrize(
    "name", ["stories", "data", "normalization", "babyllama", "other_tokenizer"]
)
def test_claims_are_on_the_page_and_their_differences_are_tested(name):
    said = yaml.safe_load((CONFIGS / "experiments" / f"{name}.yaml").read_text())
    tested = {frozenset(pair) for pair in said["pairs"]}
    assert tested >= {frozenset((claim["run"], claim["beats"])) for claim in said["claims"]}
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    own = [
        (claim["run"], claim["beats"], claim["metric"].removeprefix("test/"))
        for claim in said["claims"]
    ]
    table = re.split(r"\| run \| beats \| (?:in|metric) \|", page)[1].split("\n\n")[0]
    assert re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", table, re.MULTILINE) == own
    assert len(table.splitlines()) == 2 + len(own)
