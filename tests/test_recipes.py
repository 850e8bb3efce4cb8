"""The recipes in docs have options that there are, and the memory that is counted for them."""

import re
import sys
from pathlib import Path

import pytest

from lightning_kd.cli.named_configs import with_config_files
from lightning_kd.cli.parsing import ParsingCLI
from lightning_kd.cli.trainer_command import trainer_command
from lightning_kd.data import arithmetic_tokenizer
from lightning_kd.models import ModelSpec
from lightning_kd.models.skeleton import skeleton
from tests.support.command_line import EXPECTED_WARNINGS
from tests.support.recipes import PAGE, SIZES, recipes, with_tables

TEXT = PAGE.read_text()
RECIPES = {recipe.name: recipe for recipe in recipes(TEXT)}

pytestmark = [*EXPECTED_WARNINGS, pytest.mark.slow]


@pytest.fixture(scope="module")
def parser():
    words, sys.argv = sys.argv, ["lightning-kd"]
    made = trainer_command(ParsingCLI)
    sys.argv = words
    return made


@pytest.fixture(autouse=True)
def _files():
    for recipe in RECIPES.values():
        Path(f"{recipe.name}.yaml").write_text(recipe.text)


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_is_one(name, parser):
    assert "8 GPUs" in RECIPES[name].sized
    for words in RECIPES[name].commands:
        assert words[0] in {"fit", "cache"}
        parser.read_arguments(with_config_files(words))
        found = parser.config[words[0]]
        assert found["data"]["init_args"]["train"] == "train.jsonl"


def test_a_command_with_an_option_that_is_none_is_refused(parser, capsys):
    words = [*RECIPES["kd_llama"].commands[0], "--trainer.device", "8"]
    with pytest.raises(SystemExit):
        parser.read_arguments(words)
    assert "did you mean trainer.devices" in capsys.readouterr().err


def test_the_memory_is_what_is_counted(parser):
    assert with_tables(TEXT, parser) == TEXT, "python -m tests.support.recipes writes the tables"


PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
}
"""Weights of the models, as the hub counts them in their files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_weights_as_the_one_of_the_hub(name):
    model = skeleton(ModelSpec(config=SIZES[name]), arithmetic_tokenizer(), "teacher")
    assert model.num_parameters() == PUBLISHED[name]
    assert set(SIZES) - set(PUBLISHED) == {"runs/start"}


def row(section, gpus):
    """Gigabytes of a row of a table."""
    (line,) = re.findall(rf"memory: {section} -->.*?\n\| {gpus} \|(.*?)\n", TEXT, flags=re.S)
    units = {"GB": 1.0, "MB": 1e-3}
    cells = [cell.split() for cell in line.strip(" |").replace("|  |", "| 0 GB |").split("|")]
    return [float(number) * units[unit] for number, unit in cells]


@pytest.mark.parametrize(("gpus", "shares"), [("1 GPU", 1), ("8 GPUs", 8)])
def test_figures_follow_from_sizes_by_hand(gpus, shares):
    """Float32 weights, gradients and two states; a teacher of two bytes a weight; keys and values."""
    weights, of_teacher = (PUBLISHED[f"Qwen/Qwen3-{size}B"] * 1e-9 for size in ("0.6", "8"))
    student, optimizer, teacher, logits, cache, total = row("gkd_qwen3", gpus)
    assert student == pytest.approx(2 * 4 * weights / shares, abs=0.06)
    assert optimizer == pytest.approx(2 * 4 * weights / shares, abs=0.06)
    assert teacher == pytest.approx(2 * of_teacher / shares, abs=0.06)
    # 4 micro-batches of 8 rows, 1024 + 512 positions, 28 layers of 8 heads of 128, in float32.
    assert cache == pytest.approx(32 * 1536 * 28 * 2 * 8 * 128 * 4e-9, abs=0.06)
    assert total == pytest.approx(student + optimizer + teacher + logits + cache, abs=0.2)
