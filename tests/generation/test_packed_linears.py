"""Products by packed weights on a CPU, against the model's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.generation import (
    ContinuousBatchingSampler,
    GenerationOptions,
    SamplingOptions,
    packed_linears,
    sample,
)
from lightning_kd.generation.packed_linears import PackedProduct, packed_layers
from lightning_kd.generation.prompts import Prompts
from tests.generation.test_sampler import PROMPTS, greedy_of_transformers
from tests.support.toys import tiny_llama

EOS = {17}


@pytest.fixture
def pays(monkeypatch):
    """Weights that count as large."""
    monkeypatch.setattr(packed_linears, "LEAST_BYTES", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (7, 3), (33,)])
def test_it_is_the_linear_layer(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 301, bias=bias)
    product = PackedProduct(layer)
    with torch.inference_mode():
        states = torch.randn(*rows, 48)[..., ::2]  # not contiguous
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
    given = PackedProduct.__call__
    monkeypatch.setattr(
        PackedProduct, "__call__", lambda self, states: asked.append(1) or given(self, states)
    )
    arguments = ([(model, 1.0)], *PROMPTS, options)
    found = sample(*arguments, seeds=range(6), eos_ids=EOS, pad_id=0)
    assert len(asked) >= 2
    asked.clear()
    monkeypatch.setattr(packed_linears, "LEAST_BYTES", 2**30)
    plain = sample(*arguments, seeds=range(6), eos_ids=EOS, pad_id=0)
    assert not asked
    assert torch.equal(found.ids, plain.ids)
    torch.testing.assert_close(found.log_probs, plain.log_probs)
    if not isinstance(options, SamplingOptions):
        assert torch.equal(found.ids, greedy_of_transformers(model, EOS, 9))


def test_under_autocast_the_product_is_the_models_own(pays):
    """Which is in bfloat16, whatever the number of rows."""
    model = tiny_llama(3)
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_layers(model):
        assert "forward" not in vars(model.get_output_embeddings())


def test_weights_are_those_of_the_moment(pays):
    """What an optimizer step has changed is laid out anew the next time."""
    model, states = tiny_llama(3), torch.randn(4, 16)
    for _ in range(2):
        with torch.inference_mode(), packed_layers(model):
            found = model.lm_head(states)
        torch.testing.assert_close(found, F.linear(states, model.lm_head.weight.detach()))
        with torch.no_grad():
            model.lm_head.weight.mul_(2)


def test_continuous_batches_have_it_too(pays, monkeypatch):
    model, prompts = tiny_llama(3).eval(), Prompts(*PROMPTS, eos_ids=EOS, pad_id=0)
    asked = []
    given = PackedProduct.__call__
    monkeypatch.setattr(
        PackedProduct, "__call__", lambda self, states: asked.append(1) or given(self, states)
    )
    options = SamplingOptions(max_new_tokens=5)
    ContinuousBatchingSampler(4).generate(prompts, options, seeds=range(6), models=[(model, 1.0)])
    assert asked


def test_layers_have_their_own_pass_afterwards_even_after_an_error(pays):
    model = tiny_llama(3)
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    mine = linears[0].forward = lambda states: states

    def fail():
        with packed_layers(model, model):  # as in a mixture of a model with itself
            assert all(isinstance(layer.forward, PackedProduct) for layer in linears[1:])
            assert linears[0].forward is mine
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert linears[0].forward is mine
    assert not any("forward" in vars(layer) for layer in linears[1:])


class OwnHead(nn.Linear):
    """A head that does something else."""


@pytest.mark.parametrize(
    "change",
    [
        lambda model, monkeypatch: model.double(),
        lambda model, monkeypatch: model.bfloat16(),
        lambda model, monkeypatch: setattr(
            model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().flatten()[:40])
        ),
        lambda model, monkeypatch: monkeypatch.setattr(torch.backends.mkldnn, "is_available", bool),
        lambda model, monkeypatch: monkeypatch.setitem(
            packed_linears._SIGNATURES, "_linear_pointwise", "(Tensor X) -> Tensor Y"
        ),
        lambda model, monkeypatch: monkeypatch.setitem(packed_linears._SIGNATURES, "_none", ""),
        lambda model, monkeypatch: monkeypatch.setattr(packed_linears, "LEAST_BYTES", 2**20),
        lambda model, monkeypatch: setattr(model, "lm_head", OwnHead(16, 18)),
        lambda model, monkeypatch: model.to("meta"),
    ],
    ids=[
        "float64",
        "bfloat16",
        "shard",
        "without oneDNN",
        "other signature",
        "no operator",
        "small",
        "own class",
        "elsewhere",
    ],
)
def test_other_layers_stay_as_they_are(change, pays, monkeypatch):
    model = tiny_llama(3)
    with packed_layers(model):
        assert "forward" in vars(model.get_output_embeddings())
    change(model, monkeypatch)
    with packed_layers(model):
        assert "forward" not in vars(model.get_output_embeddings())
