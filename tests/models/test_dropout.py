"""Dropout switched off in training mode, of models that keep it in different places."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from lightning_kd.models.dropout import restore, switch_off_dropout, training
from lightning_kd.models.student_spec import LoRA
from tests.support.toys import tiny_llama

IDS = torch.arange(2, 18)[None].repeat(2, 1)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(model_type, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=18, **settings)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


MODELS = {
    "llama": lambda: tiny_llama(0, attention_dropout=0.3),
    "gpt2": lambda: build("gpt2", n_embd=16, n_layer=2, n_head=2),
    "gpt2 eager": lambda: build(
        "gpt2", n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
    ),
    # Probabilities in attributes, and whole layers that are left out.
    "opt": lambda: build(
        "opt", **SIZES, ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.5, attention_dropout=0.2
    ),
    # Layers that read the config while they compute.
    "falcon": lambda: build("falcon", **SIZES, hidden_dropout=0.2, attention_dropout=0.2),
    "gpt_neo": lambda: build(
        "gpt_neo", hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        attention_dropout=0.2, embed_dropout=0.2, resid_dropout=0.2,
    ),
    "gptj": lambda: build(
        "gptj", n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
        attn_pdrop=0.2, embd_pdrop=0.2, resid_pdrop=0.2,
    ),
    "lora": lambda: LoRA(r=2, dropout=0.3).adapt(tiny_llama(0)),
}  # fmt: skip


def logits(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_training_mode_is_evaluation_mode_without_dropout_and_comes_back(name):
    model = MODELS[name]()
    for part, parameter in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(parameter)
    config = model.config if name == "lora" else model.config.to_dict()
    expected = logits(model.eval(), 0)
    model.train()
    assert not torch.equal(logits(model, 1), logits(model, 2))
    undo = switch_off_dropout(model)
    assert all(part.training for part in model.modules())
    assert torch.equal(logits(model, 1), expected)
    saved = model.config if name == "lora" else model.config.to_dict()
    assert saved == config
    restore(undo)
    assert not torch.equal(logits(model, 1), logits(model, 2))


def test_a_mode_is_given_back_part_by_part():
    model = tiny_llama(0).eval()
    model.model.layers[0].train()
    before = [part.training for part in model.modules()]
    with training(model):
        assert all(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == before
