"""Rotary embeddings that follow the length, in generation and training."""

import pytest
import torch

from lightning_kd.generation import GenerationOptions, decoder, sample
from lightning_kd.generation.static_decoder import static_obstacle
from lightning_kd.models import StudentSpec
from lightning_kd.models.rotary import follows_length, own_length, within_own_length
from lightning_kd.modules import SFT
from tests.generation.test_host_looks import looks
from tests.generation.test_sampler import PROMPTS
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_gemma, tiny_llama

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def llama(own):
    """A model that was trained on so many positions."""
    return tiny_llama(3, max_position_embeddings=own, rope_parameters=DYNAMIC).eval()


def gemma():
    """Two kinds of layers, of which one has embeddings that follow the length."""
    return tiny_gemma(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        max_position_embeddings=64,
    )


def kinds(model):
    return [part.rope_type for part in model.modules() if hasattr(part, "rope_type")]


def generated(model, tokens):
    options = GenerationOptions(max_new_tokens=tokens)
    return sample(
        [(model, 1.0)], *PROMPTS, options, seeds=range(6), eos_ids={17}, pad_id=0, width=17
    )


@pytest.mark.parametrize("own", [8, 64], ids=["beyond its own length", "within"])
def test_the_text_is_that_of_transformers(own):
    model = llama(own)
    ours = generated(model, 20)
    theirs = model.generate(
        input_ids=PROMPTS[0],
        attention_mask=PROMPTS[1],
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=17,
        suppress_tokens=[17],
    )[:, PROMPTS[0].shape[1] :]
    assert torch.equal(ours.ids, theirs)
    assert follows_length(model)


@pytest.mark.parametrize("make", [lambda: llama(64), gemma])
def test_within_its_own_length_nothing_is_looked_at(monkeypatch, make):
    monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", 8)
    model = make()
    before = kinds(model)
    few, many = (looks(lambda tokens=tokens: generated(model, tokens)) for tokens in (9, 41))
    assert many - few == 4  # the sampler's own look
    assert kinds(model) == before
    assert follows_length(model)


def test_beyond_its_own_length_each_token_is_looked_at(monkeypatch):
    monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", 8)
    model = llama(8)
    few, many = (looks(lambda tokens=tokens: generated(model, tokens)) for tokens in (9, 41))
    assert many - few >= 32 + 4


def test_embeddings_that_have_grown_are_left_alone():
    """They return to their own frequencies with the next short row, which has to be looked at."""
    model = llama(64)
    with torch.no_grad():
        model(torch.full((1, 80), 3))
    with within_own_length([model], 20):
        assert follows_length(model)
    fresh = llama(64)
    assert torch.equal(generated(model, 20).log_probs, generated(fresh, 20).log_probs)


def test_only_what_follows_the_length_is_changed_and_it_comes_back():
    model, plain = llama(64), tiny_llama(0)
    with within_own_length([model, plain], 64):
        assert not follows_length(model)
        assert kinds(plain) == ["default"]
    with within_own_length([model], 65):
        assert follows_length(model)
    with pytest.raises(KeyError), within_own_length([model], 64):
        raise KeyError
    assert kinds(model) == ["dynamic"]


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 10,
}


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"max_position_embeddings": 10, "rope_parameters": DYNAMIC}, 10),
        ({"max_position_embeddings": 64, "rope_parameters": LONG}, 10),
        ({"max_position_embeddings": 64, "rope_parameters": PLAIN}, None),
    ],
    ids=["dynamic", "longrope", "default"],
)
def test_a_row_beyond_the_own_length_changes_those_beside_it(options, own):
    """What a model gives for a short row, alone and beside one of so many tokens."""
    model = tiny_llama(3, **options).eval().double()
    assert own_length(model) == own
    assert (static_obstacle(model) is None) == (own is None)

    def beside(length):
        ids, mask = (
            3 + torch.arange(length).expand(2, -1),
            torch.zeros(2, length, dtype=torch.long),
        )
        mask[0, :4], mask[1] = 1, 1
        places = torch.arange(length).expand(2, -1)
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=places).logits[0, :4]

    torch.testing.assert_close(beside(10), beside(5))
    same = torch.allclose(beside(11), beside(5), atol=1e-9)
    assert same == (own is None)


class Measured(Letters):
    """Letters whose longest row is known before the first step."""

    def longest(self):
        return {"train": (10, 5)}


def test_training_warns_of_rows_beyond_the_own_length():
    rope = LONG | {"original_max_position_embeddings": 4}
    student = StudentSpec.of(tiny_llama(3, max_position_embeddings=64, rope_parameters=rope))
    with pytest.warns(UserWarning, match="beyond 4 the student's rotary embeddings follow"):
        trainer(max_steps=1).fit(SFT(student=student), datamodule=Measured(8, batch_size=4))
