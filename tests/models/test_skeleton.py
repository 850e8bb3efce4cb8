"""Models without weights are those with weights, but for the numbers."""

import pytest
import torch

from lightning_kd import LoRA, ModelSpec, StudentSpec
from lightning_kd.models.context import context_length
from lightning_kd.models.skeleton import skeleton
from tests.support.toys import letter_tokenizer, tiny_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def shapes(model):
    """Names, shapes and types; tied weights once."""
    return {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()}


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama(1)
    model.generation_config.eos_token_id = [1, 7]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_a_checkpoint_is_sized_as_it_is_loaded(saved, dtype):
    spec = StudentSpec(saved, dtype=dtype, max_positions=999)
    bare = skeleton(spec, letter_tokenizer(), "student")
    loaded = spec.load(letter_tokenizer(), "student")
    assert shapes(bare) == shapes(loaded)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert bare.generation_config.eos_token_id == loaded.generation_config.eos_token_id == [1, 7]
    assert context_length(bare.config) == context_length(loaded.config) == 999


def test_a_configuration_and_adapters_are_sized_as_they_are_built():
    for spec in (StudentSpec(config=CONFIG), StudentSpec(config=CONFIG, lora=LoRA(r=3))):
        bare = skeleton(spec, letter_tokenizer(), "student")
        assert shapes(bare) == shapes(spec.build(letter_tokenizer()))


def test_a_directory_of_adapters_is_sized_as_the_model_that_it_is_merged_into(tmp_path, saved):
    peft = pytest.importorskip("peft")
    from lightning_kd.models.loading import load_checkpoint

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = peft.get_peft_model(load_checkpoint(saved), config)
    adapted.save_pretrained(tmp_path / "adapters")
    spec = ModelSpec(str(tmp_path / "adapters"))
    bare = skeleton(spec, letter_tokenizer(), "teacher")
    assert shapes(bare) == shapes(spec.load(letter_tokenizer(), "teacher"))


def test_a_model_that_was_handed_over_is_itself_and_adapters_go_into_a_copy():
    model = tiny_llama()
    assert skeleton(StudentSpec.of(model), letter_tokenizer(), "student") is model
    before = shapes(model)
    copy = skeleton(StudentSpec.of(model, lora=LoRA(r=2)), letter_tokenizer(), "student")
    assert copy.device.type == "meta"
    assert shapes(model) == before
    adapted = LoRA(r=2).adapt(model)
    assert shapes(copy) == shapes(adapted)
    with pytest.raises(ValueError, match="has adapters already"):
        skeleton(StudentSpec.of(adapted, lora=LoRA(r=2)), letter_tokenizer(), "student")


def test_what_cannot_be_loaded_cannot_be_sized(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("./none", "does not exist"), (str(tmp_path / "empty"), "cannot load")):
        with pytest.raises(ValueError, match=said):
            skeleton(ModelSpec(name), letter_tokenizer(), "teacher")
    with pytest.raises(ValueError, match="nothing reads the field"):
        skeleton(ModelSpec(config=CONFIG | {"hidden_sizes": 3}), letter_tokenizer(), "teacher")
