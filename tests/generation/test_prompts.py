"""What every engine refuses of its prompts and seeds."""

import pytest
import torch

from lightning_kd import (
    CachedSampler,
    ContinuousBatchingSampler,
    GenerationOptions,
    Prompts,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.generation import generate
from tests.generation.test_engine import ListedEngine
from tests.support.looks import Looks
from tests.support.toys import letter_tokenizer, tiny_llama

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
OPTIONS = GenerationOptions(max_new_tokens=2)
REFUSED = {
    "empty": ([[1, 1, 1], [0, 0, 0]], "row 1 of the prompts has no token"),
    "padded on the right": ([[0, 1, 1], [1, 1, 0]], r"row 1 .* has the mask \[1, 1, 0\]"),
    "with a gap": ([[1, 0, 1], [1, 1, 1]], r"row 0 .* has the mask \[1, 0, 1\]"),
}
ENGINES = [
    CachedSampler(),
    ContinuousBatchingSampler(2),
    TransformersEngine(),
    TransformersContinuousBatching(2),
]


@pytest.mark.parametrize(("mask", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_padding_that_is_not_on_the_left_is_refused(mask, said, dtype):
    with pytest.raises(ValueError, match=f"{said}; a prompt has at least one token"):
        Prompts(IDS, torch.tensor(mask, dtype=dtype), frozenset({1}), 0)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (2, 0), (0, 3)])
def test_shapes_that_are_no_rows_are_refused(shape):
    ids = IDS if shape == (2, 2) else torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"prompts of shape .* with a mask of shape"):
        Prompts(ids, torch.ones(shape), frozenset({1}), 0)


def test_the_host_looks_once_at_a_mask():
    with Looks() as counted:
        Prompts(IDS, torch.ones_like(IDS), frozenset({1}), 0)
    assert counted.count == 1


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_there_is_one_seed_for_each_row(engine, count):
    prompts = Prompts(IDS, torch.ones_like(IDS), frozenset({1}), 0)
    model = tiny_llama(0).eval()
    with pytest.raises(ValueError, match=f"{count} seeds came for 2 prompts"):
        engine.generate(prompts, OPTIONS, seeds=range(count), models=[(model, 1.0)])


@pytest.mark.parametrize("count", [1, 3])
def test_an_engine_of_your_own_gets_as_many_seeds_as_rows(count):
    given = tiny_llama(0), letter_tokenizer(), IDS, torch.ones_like(IDS), OPTIONS
    with pytest.raises(ValueError, match=f"{count} seeds came for 2 prompts"):
        generate(*given, seeds=range(count), engine=ListedEngine())
