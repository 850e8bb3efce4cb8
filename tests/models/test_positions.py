"""Rows that are longer than a model's positions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kd.models import ModelSpec, StudentSpec
from lightning_kd.models.context import context_length
from lightning_kd.models.positions import check_length
from tests.support.toys import tiny_llama

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 18}


def model(model_type, **fields):
    config = AutoConfig.for_model(model_type, **{**SMALL, **fields})
    return AutoModelForCausalLM.from_config(config)


def scaled(factor, kind, original=None):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": factor}
    return rope | ({} if original is None else {"original_max_position_embeddings": original})


@pytest.mark.parametrize(
    ("model_type", "fields", "limit"),
    [
        ("gpt2", {"max_position_embeddings": 24}, 24),
        ("llama", {"max_position_embeddings": 24}, 24),
        ("llama", {"max_position_embeddings": 24, "rope_parameters": scaled(2.0, "linear")}, 48),
        ("llama", {"max_position_embeddings": 24, "rope_parameters": scaled(4.0, "yarn", 16)}, 64),
        # Config files of the hub have the lengthened limit already.
        ("llama", {"max_position_embeddings": 64, "rope_parameters": scaled(4.0, "yarn", 16)}, 64),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_the_limit_is_what_the_config_says_its_scaling_included(model_type, fields, limit):
    found = model(model_type, **fields)
    assert context_length(found.config) == limit
    if limit is not None:
        check_length({"student": found}, limit, "rows")
        with pytest.raises(
            ValueError, match=f"rows take up to {limit + 1} .* student has {limit} pos"
        ):
            check_length({"student": found}, limit + 1, "rows")


def test_the_model_itself_ends_where_its_limit_is():
    """Of learned positions there are no more; the check agrees with what the model does."""
    gpt2 = model("gpt2", max_position_embeddings=24)
    gpt2(torch.zeros(1, context_length(gpt2.config), dtype=torch.long))
    with pytest.raises(IndexError):
        gpt2(torch.zeros(1, context_length(gpt2.config) + 1, dtype=torch.long))


def test_rotary_positions_can_be_gone_beyond_on_purpose(tokenizer):
    tiny_llama().save_pretrained("llama")
    source = StudentSpec("llama", max_positions=128)
    longer = source.load(tokenizer, "student")
    check_length({"student": longer}, 128, "rows")
    longer.save_pretrained("again")
    assert context_length(ModelSpec("again").load(tokenizer, "student").config) == 128
    model("gpt2", max_position_embeddings=24).save_pretrained("gpt2")
    with pytest.raises(ValueError, match="no rotary positions: its 24 positions are all there are"):
        StudentSpec("gpt2", max_positions=128).load(tokenizer, "student")
    for wrong in ({"config": {"model_type": "llama"}}, {"name_or_path": "llama"}):
        with pytest.raises(ValueError, match="max_positions is 0"):
            StudentSpec(**wrong, max_positions=0)
