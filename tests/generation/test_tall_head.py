"""The head's product with few rows on a CPU, the other way round, against the model's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.generation import (
    ContinuousBatchingSampler,
    GenerationOptions,
    SamplingOptions,
    sample,
    tall_head,
)
from lightning_kd.generation.engine import Prompts
from lightning_kd.generation.tall_head import TallProduct, tall_heads
from tests.generation.test_sampler import PROMPTS, greedy_of_transformers
from tests.support.toys import tiny_llama

EOS = {17}


@pytest.fixture
def pays(monkeypatch):
    """Two threads, and a head that counts as large."""
    monkeypatch.setattr(tall_head, "LEAST_BYTES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (7, 3), (32,), (33,)])
def test_it_is_the_linear_layer(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 301, bias=bias)
    product = TallProduct(layer)
    with torch.inference_mode():
        for _ in range(2):  # into the buffer that the first has left
            states = torch.randn(*rows, 24)
            exact = F.linear(
                states.double(), layer.weight.double(), layer.bias.double() if bias else None
            )
            found = product(states)
            assert found.is_contiguous()
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [GenerationOptions(9), SamplingOptions(max_new_tokens=9)])
def test_completions_are_what_they_were(options, pays, monkeypatch):
    """Beside greedy ones of transformers, and the sampler's with the model's own product."""
    model, asked = tiny_llama(3).eval(), []
    given = TallProduct.__call__
    monkeypatch.setattr(
        TallProduct, "__call__", lambda self, states: asked.append(1) or given(self, states)
    )
    arguments = ([(model, 1.0)], *PROMPTS, options)
    found = sample(*arguments, seeds=range(6), eos_ids=EOS, pad_id=0)
    assert len(asked) >= 2
    asked.clear()
    torch.set_num_threads(1)
    plain = sample(*arguments, seeds=range(6), eos_ids=EOS, pad_id=0)
    assert not asked
    assert torch.equal(found.ids, plain.ids)
    torch.testing.assert_close(found.log_probs, plain.log_probs)
    if not isinstance(options, SamplingOptions):
        assert torch.equal(found.ids, greedy_of_transformers(model, EOS, 9))


def test_under_autocast_the_product_is_the_models_own(pays):
    """Which is in bfloat16, whatever the number of rows."""
    model = tiny_llama(3)
    with torch.autocast("cpu", dtype=torch.bfloat16), tall_heads(model):
        assert "forward" not in vars(model.get_output_embeddings())


def test_continuous_batches_have_it_too(pays, monkeypatch):
    model, prompts = tiny_llama(3).eval(), Prompts(*PROMPTS, eos_ids=EOS, pad_id=0)
    asked = []
    given = TallProduct.__call__
    monkeypatch.setattr(
        TallProduct, "__call__", lambda self, states: asked.append(1) or given(self, states)
    )
    options = SamplingOptions(max_new_tokens=5)
    ContinuousBatchingSampler(4).generate(prompts, options, seeds=range(6), models=[(model, 1.0)])
    assert asked


def test_a_head_has_its_own_pass_afterwards_even_after_an_error(pays):
    model = tiny_llama(3)
    head = model.get_output_embeddings()

    def fail():
        with tall_heads(model):
            assert isinstance(head.forward, TallProduct)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(head)


class OwnHead(nn.Linear):
    """A head that does something else."""


@pytest.mark.parametrize(
    "change",
    [
        lambda model, monkeypatch: model.double(),
        lambda model, monkeypatch: model.bfloat16(),
        lambda model, monkeypatch: torch.set_num_threads(1),
        lambda model, monkeypatch: monkeypatch.setattr(tall_head, "LEAST_BYTES", 2**20),
        lambda model, monkeypatch: setattr(model, "lm_head", OwnHead(16, 18)),
        lambda model, monkeypatch: model.to("meta"),
    ],
    ids=["float64", "bfloat16", "one thread", "small", "own class", "elsewhere"],
)
def test_other_heads_stay_as_they_are(change, pays, monkeypatch):
    model = tiny_llama(3)
    with tall_heads(model):
        assert "forward" in vars(model.get_output_embeddings())
    change(model, monkeypatch)
    with tall_heads(model):
        assert "forward" not in vars(model.get_output_embeddings())
