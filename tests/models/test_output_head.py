"""The output heads of many architectures: read right, or refused.

Each head is looked for while the logits are as small as those of a fresh model. What it gives is
compared with the model's own logits when they have become large.
"""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lightning_kd.models import DenseLogits, FusedLogits, vocabulary_size
from lightning_kd.models.output_head import UnsupportedHeadError, find_head
from lightning_kd.scoring import ScoredPositions
from tests.support.toys import ragged_batch, tiny_llama

VOCABULARY = 18
BATCH = ragged_batch([(2, 5), (1, 3), (3, 7), (2, 1)])
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
SPECIAL = {"image_token_id": 17, "boi_token_id": 16, "eoi_token_id": 15, "mm_tokens_per_image": 4}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}

KINDS = {
    "untied": ("llama", SMALL | {"tie_word_embeddings": False}),
    "tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2 | {"bos_token_id": 1, "eos_token_id": 1}),
    "bias": ("phi", SMALL),
    "gemma2": ("gemma2", SMALL | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", SMALL | {"final_logit_softcapping": 5.0}),
    "recurrent_gemma": (
        "recurrent_gemma",
        SMALL | {"logits_soft_cap": 30.0, "lru_width": 16, "attention_window_size": 16},
    ),
    "nanochat": ("nanochat", SMALL | {"final_logit_softcapping": 15.0}),
    "cohere": ("cohere", SMALL | {"logit_scale": 0.0625}),
    "granite": ("granite", SMALL | {"logits_scaling": 3.0}),
    "falcon_h1": ("falcon_h1", SMALL | MAMBA | {"lm_head_multiplier": 0.3}),
    "gemma3 composite": (
        "gemma3",
        SPECIAL
        | {"text_config": SMALL | {"model_type": "gemma3_text", "final_logit_softcapping": 3.0}}
        | {"vision_config": VISION | {"model_type": "siglip_vision_model"}},
    ),
    "gemma4 composite": (
        "gemma4",
        SPECIAL
        | {
            "text_config": SMALL
            | {
                "model_type": "gemma4_text",
                "final_logit_softcapping": 3.0,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 4,
            },
            "vision_config": None,
            "audio_config": None,
        },
    ),
}


def build(name):
    kind, fields = KINDS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


def enlarge(network, factor=200.0):
    """What training does to a fresh head."""
    with torch.no_grad():
        for part in network.get_output_embeddings().parameters():
            part.mul_(factor)


def both_ways(network, head_logits):
    """Logits of the scored positions, from the head and from the model, float64."""
    positions = ScoredPositions.from_labels(BATCH["labels"])
    network.eval()
    with torch.no_grad():
        source = head_logits.read(network, BATCH, positions)
        found = torch.empty(source.shape, dtype=source.dtype)
        source.fill(slice(0, len(found)), found)
        given = DenseLogits().read(network, BATCH, positions).logits
    return found.double(), given.double()


def assert_close(found, given, dtype):
    """Within the roundings of a sum of 16 products that is itself of the largest logit's size."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, given, rtol=8 * eps, atol=4 * eps * given.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_head_found_on_a_fresh_model_gives_its_logits_for_good(name, dtype):
    network = build(name).to(dtype)
    logits = FusedLogits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(*both_ways(network, logits), dtype)
        enlarge(network)
        found, given = both_ways(network, logits)
    assert given.abs().max() > 1
    assert_close(found, given, dtype)
    assert vocabulary_size(network) == found.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [3.0, 30.0, 300.0, 2000.0])
def test_a_soft_cap_is_found_whatever_the_size_of_the_logits(cap, dtype):
    kind, fields = KINDS["recurrent_gemma"]
    config = AutoConfig.for_model(kind, **fields | {"logits_soft_cap": cap})
    assert find_head(AutoModelForCausalLM.from_config(config).to(dtype)).softcap == cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_the_head(dtype):
    network = tiny_llama(0).to(dtype)
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, part in adapted.named_parameters():
            if "lora_B" in name:
                part.normal_()
    assert_close(*both_ways(adapted, FusedLogits()), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["untied", "gemma2", "bias"])
def test_a_head_under_autocast(name, dtype):
    network = build(name)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype):
        warnings.simplefilter("error")
        assert_close(*both_ways(network, FusedLogits()), dtype)


class Changed(LlamaForCausalLM):
    """A Llama that does something of its own to its logits."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def banning(logits):
    ban = torch.arange(logits.shape[-1]) >= VOCABULARY // 2
    return logits.masked_fill(ban, -torch.inf)


def writing_over(logits):
    logits[..., 3] = -torch.inf
    return logits


CHANGES = {
    "banned": banning,
    "one token in place": writing_over,
    "scaled in place": lambda logits: logits.mul_(1.0 + 1e-6),
    "banned and bent": lambda logits: banning(3 * logits.sin()),
    "sin": torch.sin,
    "tanh": torch.tanh,
    "undeclared cap": lambda logits: 1000 * (logits / 1000).tanh(),
    "a percent": lambda logits: 1.01 * logits,
    "normalized": lambda logits: logits.log_softmax(-1),
    "shifted": lambda logits: logits + 1e-4,
    "one token": lambda logits: torch.cat([logits[..., :5], logits[..., 5:] * 1.001], -1),
    "one position": lambda logits: torch.cat([logits[:, :1], 2 * logits[:, 1:]], 1),
    "narrower": lambda logits: logits[..., :-1],
    "not a number": lambda logits: logits.masked_fill(logits == 0, torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_any_other_change_of_the_logits_is_refused(name, dtype):
    torch.manual_seed(0)
    network = Changed(tiny_llama(0).config).to(dtype)
    network.change = CHANGES[name]
    with pytest.raises(UnsupportedHeadError, match="do not explain"):
        find_head(network)
    assert "forward" not in vars(network.lm_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.95, 1.03])
@pytest.mark.parametrize("declared", [1.03, None])
def test_a_scale_that_narrowing_could_hide(scale, declared, dtype):
    network = Changed(tiny_llama(0).config).to(dtype)
    network.config.logit_scale = declared
    network.change = lambda logits: (logits.float() * scale).to(torch.bfloat16)
    if scale == declared:
        assert find_head(network).scale == scale
        return
    with pytest.raises(UnsupportedHeadError, match="do not explain"):
        find_head(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_declared_scale_that_is_not_applied(dtype):
    network = Changed(tiny_llama(0).config).to(dtype)
    network.config.logit_scale = 1.03
    network.change = lambda logits: logits.to(torch.bfloat16)
    assert find_head(network).scale == 1.0


@pytest.mark.parametrize("apart", [1, 13, 39])
def test_an_exchange_of_two_tokens_shows(apart):
    network = Changed(tiny_llama(0, vocab_size=96).config)
    network.change = lambda logits: logits.roll(apart, -1)
    with pytest.raises(UnsupportedHeadError, match="do not explain"):
        find_head(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "bend", [torch.tanh, torch.sin, lambda x: 30 * (x / 30).tanh(), lambda x: 1.1 * x]
)
def test_a_head_that_bends_its_own_product_is_refused(bend, dtype):
    class Bent(nn.Linear):
        def forward(self, states):
            return bend(super().forward(states))

    network = tiny_llama(0)
    network.lm_head = Bent(16, VOCABULARY, bias=False)
    nn.init.normal_(network.lm_head.weight, std=0.02)
    with pytest.raises(UnsupportedHeadError, match="do not explain"):
        find_head(network.to(dtype))


def test_what_is_refused_is_read_from_the_model_and_trains():
    torch.manual_seed(0)
    network = Changed(tiny_llama(0).config)
    network.change = CHANGES["banned and bent"]
    with pytest.warns(UserWarning, match="is not used for Changed"):
        found, given = both_ways(network, FusedLogits())
    assert torch.equal(found, given)
    assert found.isinf().any()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_model_that_begins_to_write_over_its_logits(mode):
    """As xLSTM does in evaluation mode with long rows: the hidden states stay what they were."""
    torch.manual_seed(0)
    network = Changed(tiny_llama(0).config)
    positions = ScoredPositions.from_labels(BATCH["labels"])
    logits = FusedLogits()
    with torch.no_grad():
        before = logits.read(network, BATCH, positions).factors[0][0]
    network.change = lambda logits: logits.mul_(2.0)
    with mode():
        if torch.is_grad_enabled():
            with pytest.raises(RuntimeError, match="writes over its logits in place"):
                logits.read(network, BATCH, positions)
        else:
            after = logits.read(network, BATCH, positions).factors[0][0]
            assert torch.equal(before, after)


def test_a_bias_of_minus_infinity_bans_a_token():
    network = build("bias")
    with torch.no_grad():
        network.get_output_embeddings().bias[4] = -torch.inf
    found, given = both_ways(network, FusedLogits())
    assert torch.equal(found.isneginf(), given.isneginf())
    assert found.isneginf().any()
    assert_close(found[:, :4], given[:, :4], torch.float32)


def test_every_part_keeps_its_mode():
    network = tiny_llama(0).train()
    network.model.layers[0].eval()
    before = [part.training for part in network.modules()]
    find_head(network)
    assert [part.training for part in network.modules()] == before
    assert len(set(before)) == 2
