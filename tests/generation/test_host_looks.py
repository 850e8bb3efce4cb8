"""How often the host waits for the device while tokens are generated."""

import pytest
import torch

from lightning_kd.generation import GenerationOptions, SamplingOptions, decoder, sample
from lightning_kd.generation.uniforms import DRAWN_AT_ONCE, Uniforms
from tests.generation.test_sampler import BATCH, PROMPTS, other_models
from tests.support.looks import Looks
from tests.support.toys import tiny_llama

NEVER = {"eos_ids": {17}, "pad_id": 0, "width": 17}
"""An end that is beyond the width, and so is never drawn."""


def looks(generate):
    with Looks() as counted:
        generate()
    return counted.count


@pytest.fixture
def every_8(monkeypatch):
    """Generation as on a GPU."""
    monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", 8)


ROPE = {"rope_theta": 10_000.0, "factor": 2.0}
LONG = ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}


def rotary():
    """Embeddings that follow the length: beyond what a model was trained on, or not as far as that."""
    for name, own, rope in (
        ("dynamic NTK", 256, ROPE | {"rope_type": "dynamic"}),
        ("long rotary", 64, LONG),
    ):
        model = tiny_llama(3, max_position_embeddings=own, rope_parameters=rope).eval()
        yield pytest.param(model, id=name)


OPTIONS = {
    "greedy": GenerationOptions,
    "sampled": SamplingOptions,
    "truncated": lambda max_new_tokens: SamplingOptions(
        max_new_tokens=max_new_tokens, top_k=5, top_p=0.9
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    "model", [pytest.param(tiny_llama(3).eval(), id="llama"), *other_models(), *rotary()]
)
def test_the_host_looks_once_in_eight_tokens(every_8, model, kind):
    """Also where prompts are padded, and the masks of transformers have something to mask."""
    assert not BATCH["prompt_mask"].all()

    def generated(tokens):
        options = OPTIONS[kind](max_new_tokens=tokens)
        return sample([(model, 1.0)], *PROMPTS, options, seeds=range(6), **NEVER)

    generated(1)  # long rotary embeddings are made in the first pass
    few, many = (looks(lambda tokens=tokens: generated(tokens)) for tokens in (9, 41))
    assert many - few == (41 - 9) // 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("model", [pytest.param(tiny_llama(3).eval(), id="llama"), *other_models()])
def test_a_static_cache_is_looked_at_no_more_often(every_8, model, kind):
    def generated(tokens):
        options = OPTIONS[kind](max_new_tokens=tokens)
        given = [(model, 1.0)], *PROMPTS, options
        return sample(*given, seeds=range(6), cache="static", **NEVER)

    few, many = (looks(lambda tokens=tokens: generated(tokens)) for tokens in (9, 57))
    assert many - few == (57 - 9) // 8


def test_looks_are_counted():
    values = torch.tensor([1.0, 0.0])

    def several():
        bool(values.all())
        int(values.sum())
        values.nonzero()
        values[values > 0] = 2.0
        values[torch.tensor([0])] = 3.0

    assert looks(several) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("model", [pytest.param(tiny_llama(3).eval(), id="llama"), *other_models()])
def test_the_text_is_the_same_however_often_the_host_looks(monkeypatch, model, kind):
    found = []
    for between in (1, 8, 100):
        monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", between)
        options = OPTIONS[kind](max_new_tokens=40)
        given = [(model, 1.0)], *PROMPTS, options
        found.append(sample(*given, seeds=range(6), eos_ids={1, 5, 9}, pad_id=0))
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        assert torch.equal(other.mask, found[0].mask)
        assert torch.equal(other.ended, found[0].ended)
        torch.testing.assert_close(other.log_probs, found[0].log_probs, atol=1e-5, rtol=0)


def test_a_gpu_is_looked_at_less_often_than_a_cpu():
    assert decoder.tokens_between_looks(torch.device("cpu")) == 1
    assert decoder.tokens_between_looks(torch.device("cuda")) == 8


def test_blocks_of_rows_follow_their_own_generators():
    numbers = Uniforms([5, 6, 7], torch.device("cpu"))
    first, second = numbers.block([2, 0]), numbers.block([0])
    for row, seed in ((0, 7), (1, 5)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.rand(2 * DRAWN_AT_ONCE, generator=generator, dtype=torch.float64)
        assert torch.equal(first[row], expected[:DRAWN_AT_ONCE])
        if row == 1:
            assert torch.equal(second[0], expected[DRAWN_AT_ONCE:])
