import json

import pytest
import torch

from lightning_kd.models import LoRA, ModelSpec, StudentSpec, vocabulary_size
from tests.support.toys import tiny_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_saved_directory_comes_back(tokenizer, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    loaded = ModelSpec(str(tmp_path / "model")).load(tokenizer, "student")
    ids = torch.arange(2, 10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype(tokenizer, tmp_path, dtype):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "model")
    loaded = ModelSpec(str(tmp_path / "model"), dtype=dtype).load(tokenizer, "student")
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))


def test_a_config_starts_at_random_with_the_tokenizers_vocabulary(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    student = ModelSpec(config=str(tmp_path / "config.json")).load(tokenizer, "student")
    again = ModelSpec(config=CONFIG).load(tokenizer, "student")
    teacher = ModelSpec(config=CONFIG).load(tokenizer, "teacher")
    assert vocabulary_size(student) == len(tokenizer)
    assert student.config.eos_token_id == tokenizer.eos_token_id
    weights = [next(m.parameters()) for m in (student, again, teacher)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loading_leaves_the_global_random_state_alone(tokenizer):
    before = torch.random.get_rng_state()
    ModelSpec(config=CONFIG).load(tokenizer, "student")
    assert torch.equal(before, torch.random.get_rng_state())


def test_attention_implementation_reaches_the_model(tokenizer):
    model = ModelSpec(config=CONFIG, attn_implementation="eager").load(tokenizer, "student")
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_gives_the_same_gradient(tokenizer):
    ids = torch.arange(2, 10)[None]
    gradients = []
    for on in (False, True):
        model = StudentSpec(config=CONFIG, gradient_checkpointing=on).build(tokenizer)
        assert on == any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append(next(model.parameters()).grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("error:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapters_alone(tokenizer, checkpointing):
    student = StudentSpec(config=CONFIG, lora=LoRA(r=2), gradient_checkpointing=checkpointing)
    model = student.build(tokenizer)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    model(input_ids=torch.arange(2, 10)[None], use_cache=False).logits.logsumexp(
        -1
    ).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_runs_seed_decides_the_adapters_whatever_has_been_drawn(tokenizer, monkeypatch):
    def adapters(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.rand(seed + 1)
        before = torch.get_rng_state()
        model = StudentSpec(config=CONFIG, lora=LoRA(r=2)).build(tokenizer)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    first = adapters(3)
    assert torch.equal(adapters(3), first)
    assert not torch.equal(adapters(4), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither came"),
        ({"name_or_path": "a", "config": CONFIG}, "both came"),
        ({"name_or_path": "./nowhere"}, "does not exist"),
        ({"name_or_path": "/no/such/model"}, "does not exist"),
        ({"name_or_path": "gpt2-not-here"}, "cannot load the model 'gpt2-not-here'"),
        ({"config": {"hidden_size": 8}}, "lacks model_type"),
        ({"config": {"model_type": "llamma"}}, "not understood"),
        ({"config": "missing.json"}, "not a readable JSON file"),
        ({"config": CONFIG | {"vocab_size": 4}}, "ids up to 17, but the student has 4 logits"),
    ],
)
def test_wrong_sources_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        StudentSpec(**arguments).build(tokenizer)


def test_a_directory_without_a_model_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load the model"):
        StudentSpec(str(tmp_path / "empty")).build(tokenizer)
