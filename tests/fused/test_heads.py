"""Real models, with heads of every kind: the fused path against the model's own logits."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lightning_kd.fused import compilation, fused_linear_divergence
from lightning_kd.models import DenseLogits, FusedLogits, LoRA, StudentSpec
from lightning_kd.models.output_head import find_head
from lightning_kd.modules import SFT, BabyLlama, SupervisedKD
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble
from tests.support.harness import fit_one_step
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (1, 3), (3, 7), (2, 1)])
SMALL = {
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


def model(kind, seed=0, **config):
    torch.manual_seed(seed)
    vocabulary = len(letter_tokenizer())
    fields = SMALL | {"vocab_size": vocabulary} | config
    if kind == "gpt2":
        fields = {
            "vocab_size": vocabulary,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 1,
        } | config
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for weight in network.get_output_embeddings().parameters():
            weight.mul_(40)  # logits large enough for a soft cap to bend
    return network


KINDS = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "soft cap": ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "logit scale": ("cohere", {"logit_scale": 0.25}),
    "logits scaling": ("granite", {"logits_scaling": 8.0}),
}


def step(
    student,
    logits,
    teacher=None,
    method=SupervisedKD,
    batch=BATCH,
    precision=None,
    batches=1,
    **options,
):
    """The loss and the gradient of one optimizer step."""
    settings = {} if precision is None else {"precision": precision}
    if teacher is not None:
        options["teacher"] = teacher
    module = method(student=student, logits_backend=logits, **options)
    return fit_one_step(module, [batch] * batches, **settings)


def assert_same(first, second, tolerance):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    scale = second[1].abs().max().item()
    torch.testing.assert_close(first[1], second[1], rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_the_same_as_with_all_logits(name):
    kind, config = KINDS[name]
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        student = StudentSpec.of(model(kind, 0, **config).double())
        teacher = LocalTeacher.of(model(kind, 1, **config).double())
        results.append(step(student, logits, teacher, temperature=2.0, alpha=0.3))
    assert_same(*results, tolerance=1e-6)  # networks have islands of float32


@pytest.mark.parametrize("name", KINDS)
def test_a_head_is_found_with_its_scale_and_soft_cap(name):
    kind, config = KINDS[name]
    head = find_head(model(kind, **config))
    assert head.softcap == config.get("final_logit_softcapping")
    expected = config.get("logit_scale", 1 / config.get("logits_scaling", 1.0))
    assert head.scale == expected


def test_gradient_checkpointing_and_a_frozen_backbone():
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        student = StudentSpec.of(tiny_llama(0), gradient_checkpointing=True)
        teacher = LocalTeacher.of(tiny_llama(1))
        results.append(step(student, logits, teacher))
    assert_same(*results, tolerance=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_on_the_body_and_on_the_head(targets):
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        torch.manual_seed(5)
        student = StudentSpec.of(tiny_llama(0), lora=LoRA(r=2, target_modules=targets))
        teacher = LocalTeacher.of(tiny_llama(1))
        results.append(step(student, logits, teacher))
    assert_same(*results, tolerance=1e-5)


@pytest.mark.parametrize("combine", ["logits", "probabilities", "log_probs"])
def test_an_ensemble(combine):
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        members = [LocalTeacher.of(tiny_llama(seed)) for seed in (1, 2, 3)]
        teacher = TeacherEnsemble(members, combine=combine, weights=[1.0, 2.0, 0.0])
        results.append(step(StudentSpec.of(tiny_llama(0)), logits, teacher, method=BabyLlama))
    assert_same(*results, tolerance=1e-5)


def test_routed_teachers():
    batch = {**BATCH, "extra": {"teacher": ["a", "b", "a", "a"]}}
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        members = {name: LocalTeacher.of(tiny_llama(seed)) for name, seed in (("a", 1), ("b", 2))}
        teacher = RoutedTeacher(members)
        results.append(step(StudentSpec.of(tiny_llama(0)), logits, teacher, batch=batch))
    assert_same(*results, tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:the .* gives .* beyond")
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_heads_of_unequal_width_are_cut_to_the_narrower(wider):
    results = []
    for logits in (FusedLogits(), DenseLogits()):
        sizes = {"student": 18, "teacher": 18} | {wider: 23}
        student = StudentSpec.of(tiny_llama(0, vocab_size=sizes["student"]))
        teacher = LocalTeacher.of(tiny_llama(1, vocab_size=sizes["teacher"]))
        results.append(step(student, logits, teacher, vocabulary="shared"))
    assert_same(*results, tolerance=1e-5)


def test_float32_logits_from_a_bfloat16_model():
    """The model's own logits are rounded; the fused ones are those of its hidden states."""
    student, teacher = (tiny_llama(seed).bfloat16() for seed in (0, 1))
    with torch.no_grad():
        for network in (student, teacher):
            network.lm_head.weight.mul_(30)
    with torch.no_grad():
        pair = []
        for network in (student, teacher):
            states = network.model(BATCH["input_ids"], BATCH["attention_mask"]).last_hidden_state
            logits = states.double() @ network.lm_head.weight.double().T
            pair.append(logits.log_softmax(-1))
    labeled = torch.nn.functional.pad(BATCH["labels"][:, 1:], (0, 1), value=-100) != -100
    own, other = (side[labeled] for side in pair)
    exact = (other.exp() * (other - own)).sum(-1).mean().item()
    losses = [
        step(
            StudentSpec.of(student),
            logits,
            LocalTeacher.of(teacher),
            alpha=0.0,
            precision="bf16-true",
        )[0]
        for logits in (FusedLogits(), DenseLogits())
    ]
    assert losses[0] == pytest.approx(exact, rel=1e-5)
    assert abs(losses[1] - exact) > 20 * abs(losses[0] - exact)


class Doubling(LlamaForCausalLM):
    """Does something with its logits that no configuration tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_that_is_not_understood_is_read_whole_and_says_so_once():
    torch.manual_seed(0)
    odd = Doubling(tiny_llama(0).config)
    with pytest.warns(UserWarning, match="is not used for Doubling: .* do not explain") as caught:
        got = step(StudentSpec.of(odd), FusedLogits(), method=SFT, batches=2)
    assert len([w for w in caught if "Doubling" in str(w.message)]) == 1
    torch.manual_seed(0)
    again = Doubling(tiny_llama(0).config)
    whole = step(StudentSpec.of(again), DenseLogits(), method=SFT, batches=2)
    assert_same(got, whole, tolerance=1e-6)


def test_a_model_that_is_not_understood_is_refused_where_compiled_code_is_asked_for():
    odd = Doubling(tiny_llama(0).config)
    with pytest.raises(
        ValueError, match=r"compile is always, and .* not used for Doubling: .* auto"
    ):
        step(StudentSpec.of(odd), FusedLogits(compile="always"), method=SFT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "soft cap"])
def test_a_step_is_the_same_as_compiled_code(name, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traced; making code takes half a minute
    kind, config = KINDS[name]
    results = []
    for mode in ("always", "never"):
        student = StudentSpec.of(model(kind, 0, **config).double())
        teacher = LocalTeacher.of(model(kind, 1, **config).double())
        before = counters["stats"]["unique_graphs"]
        results.append(
            step(student, FusedLogits(compile=mode), teacher, temperature=2.0, alpha=0.3)
        )
        assert (counters["stats"]["unique_graphs"] > before) == (mode == "always")
    assert_same(*results, tolerance=1e-6)


def test_looking_for_the_head_leaves_the_model_as_it_was():
    network = tiny_llama(0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_head(network)
    assert network.training
    assert "forward" not in vars(network.lm_head)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "64", float("nan"), float("inf")])
def test_a_budget_must_be_positive(size):
    with pytest.raises(
        ValueError, match=rf"chunk_megabytes is {size!r}; .* whole number, 1 or more"
    ):
        FusedLogits(chunk_megabytes=size)
    states, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=rf"chunk_bytes is {size!r}; .* whole number, 1 or more"):
        fused_linear_divergence(states, weight, states, weight, chunk_bytes=size)


@pytest.mark.parametrize(
    ("given", "came"), [(FusedLogits, "the class FusedLogits"), ("FusedLogits", "'FusedLogits'")]
)
def test_a_backend_is_an_object(given, came):
    with pytest.raises(
        ValueError,
        match=rf"logits_backend is {came}; .* instance of LogitsBackend, such as FusedLogits\(\)",
    ):
        SFT(student="./student", logits_backend=given)
