"""Every weight of a model comes from its checkpoint, and every weight of a checkpoint is used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from lightning_kd.models import LoRA, ModelSpec, StudentSpec
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from tests.support.toys import letter_tokenizer, tiny_llama

IDS = torch.arange(2, 10)[None]


def saved(name, model=None, change=None, **config):
    """A directory whose weights or config have been tampered with."""
    (model or tiny_llama(1)).save_pretrained(name)
    directory = Path(name)
    if change is not None:
        weights = change(load_file(directory / "model.safetensors"))
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | config))
    return str(directory)


def renamed(weights):
    return {f"module.{name}": weight for name, weight in weights.items()}


def without(*names):
    return lambda weights: {n: w for n, w in weights.items() if not any(x in n for x in names)}


def classifier():
    config = {"vocab_size": 18, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
    return LlamaForSequenceClassification(
        LlamaConfig(**config, num_hidden_layers=2, num_attention_heads=2)
    )


WRONG = {
    "every tensor renamed": (
        {"change": renamed},
        ["21 missing", "21 not part of the architecture", "module.lm_head.weight"],
    ),
    "three layers over two": (
        {"num_hidden_layers": 3},
        ["9 missing, which would be random: model.layers.2.input_layernorm.weight"],
    ),
    "one layer over two": (
        {"num_hidden_layers": 1},
        ["9 not part of the architecture", "model.layers.1."],
    ),
    "no head": ({"change": without("lm_head")}, ["1 missing", "lm_head.weight"]),
    "a wider head": (
        {"change": lambda weights: weights | {"lm_head.weight": torch.zeros(20, 16)}},
        ["1 of another shape", "lm_head.weight (saved (20, 16), expected (18, 16))"],
    ),
    "a classifier": ({"model": classifier}, ["1 missing", "lm_head", "score.weight"]),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", [StudentSpec, LocalTeacher])
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_lists(tokenizer, kind, case):
    changes, expected = WRONG[case]
    model = changes.get("model", tiny_llama)()
    name = saved("model", **changes | {"model": model})
    with pytest.raises(ValueError, match="does not hold the weights of its config") as error:
        kind(name).load(tokenizer, "student")
    assert all(text in str(error.value) for text in expected), error.value
    assert len(str(error.value).splitlines()) <= 6


def test_members_of_an_ensemble_and_of_a_routed_teacher_are_checked(tokenizer):
    good, bad = saved("good"), saved("bad", num_hidden_layers=3)
    members = [LocalTeacher(good), LocalTeacher(bad)]
    for teacher in (TeacherEnsemble(members), RoutedTeacher(dict(zip("ab", members, strict=True)))):
        with pytest.raises(ValueError, match="9 missing"):
            teacher.prepare(tokenizer, torch.device("cpu"), "equal")


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=18, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


RIGHT = {
    "tied": {"model": lambda: tiny_llama(1, tie_word_embeddings=True)},
    "constants of old versions": {
        "model": gpt2,
        "change": lambda weights: (
            weights
            | {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
        ),
    },
    "rotary frequencies": {
        "change": lambda weights: (
            weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        )
    },
    "without a prefix": {
        "model": gpt2,
        "change": lambda weights: {n.removeprefix("transformer."): w for n, w in weights.items()},
    },
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_no_weight_or_has_another_name_is_no_reason(tokenizer, case):
    model = RIGHT[case].get("model", lambda: tiny_llama(1))()
    name = saved("model", model, RIGHT[case].get("change"))
    loaded = StudentSpec(name).load(tokenizer, "student")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_shards_come_back_and_a_lost_one_is_an_error(tokenizer):
    model = tiny_llama(1)
    model.save_pretrained("model", max_shard_size="4KB")
    shards = sorted(Path("model").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(StudentSpec("model").load(tokenizer, "s")(IDS).logits, model(IDS).logits)
    shards[1].unlink()
    with pytest.raises(ValueError, match="cannot load the model 'model'"):
        StudentSpec("model").load(tokenizer, "student")


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantized_weights_are_all_of_them(tokenizer, bits):
    pytest.importorskip("bitsandbytes")
    teacher = LocalTeacher(
        saved("model"), quantization={"quant_method": "bitsandbytes", bits: True}
    )
    teacher.load(tokenizer, "teacher").save_pretrained("quantized")
    assert ModelSpec("quantized").load(tokenizer, "teacher").hf_quantizer is not None
    wrong = LocalTeacher(
        saved("model", num_hidden_layers=3),
        quantization={"quant_method": "bitsandbytes", bits: True},
    )
    with pytest.raises(ValueError, match="9 missing"):
        wrong.load(tokenizer, "teacher")


def adapters(base, change=None):
    """A directory of adapters that move the logits; the merged model."""
    from peft import get_peft_model_state_dict

    model = LoRA(r=2).adapt(AutoModelForCausalLM.from_pretrained(base))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained("adapters")
    if change is not None:
        weights = change(get_peft_model_state_dict(model))
        save_file(weights, "adapters/adapter_model.safetensors", metadata={"format": "pt"})
    return model.merge_and_unload()


@pytest.mark.filterwarnings("error:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_into_their_model_and_all_of_it_trains(tokenizer):
    expected = adapters(saved("base"))
    before = torch.random.get_rng_state()
    student = StudentSpec("adapters").build(tokenizer)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(student(IDS).logits, expected(IDS).logits)
    assert (student(IDS).logits - tiny_llama(1)(IDS).logits).abs().max() > 1e-2
    assert all(weight.requires_grad for weight in student.parameters())


def test_adapters_and_the_model_under_them_are_checked(tokenizer):
    base = saved("base")
    adapters(
        base, lambda weights: {n.replace("layers.1", "layers.7"): w for n, w in weights.items()}
    )
    with pytest.raises(
        ValueError, match=r"'adapters' does not hold(.|\n)*14 missing(.|\n)*layers.7"
    ):
        StudentSpec("adapters").load(tokenizer, "student")
    adapters(base)
    saved("base", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"'base' does not hold(.|\n)*9 missing"):
        StudentSpec("adapters").load(tokenizer, "student")


def test_a_real_checkpoint_is_whole(shared_data):
    source = StudentSpec(str(shared_data / "models" / "stories260K"))
    assert source.load(letter_tokenizer(), "student").config.num_hidden_layers == 5


def test_a_model_that_sees_later_tokens_is_refused(tokenizer):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 18}
    encoder = BertLMHeadModel(BertConfig(**sizes))
    for spec, role in ((StudentSpec.of(encoder), "student"), (ModelSpec.of(encoder), "teacher")):
        with pytest.raises(
            ValueError, match=f"the {role} is a BertLMHeadModel .* is_decoder: false"
        ):
            spec.load(tokenizer, role)
    ModelSpec.of(BertLMHeadModel(BertConfig(**sizes, is_decoder=True))).load(tokenizer, "teacher")
