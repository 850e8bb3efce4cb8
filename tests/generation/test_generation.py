import re

import pytest
import torch

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import (
    CachedSampler,
    GenerationOptions,
    SamplingOptions,
    TransformersEngine,
    completion_mask,
    generate,
)
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.scripts import ROOT
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
PROMPTS = BATCH["prompt_ids"], BATCH["prompt_mask"]
SEEDS = [1, 2, 3]
ENGINES = pytest.mark.parametrize("engine", [CachedSampler, TransformersEngine])


def by_hand(model, prompt, steps):
    """The most likely token, one full forward pass at a time."""
    ids = prompt[None]
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
        if ids[0, -1] == 1:
            break
    return ids[0, len(prompt) :]


@torch.no_grad()
@ENGINES
def test_greedy_completions_are_the_argmax_of_full_forward_passes(tokenizer, engine):
    model = tiny_llama(3).eval()
    options = GenerationOptions(max_new_tokens=9)
    written = generate(model, tokenizer, *PROMPTS, options, seeds=SEEDS, engine=engine())
    for row, (ids, mask) in enumerate(zip(*PROMPTS, strict=True)):
        expected = by_hand(model, ids[mask.bool()], 9)
        assert torch.equal(written.ids[row][written.mask[row]], expected)
        assert written.ended[row] == (expected[-1] == 1)


@ENGINES
def test_samples_repeat_with_their_seeds_and_leave_the_global_state_alone(tokenizer, engine):
    model = tiny_llama(0).train()
    options = GenerationOptions(max_new_tokens=12, temperature=1.0)
    before = torch.random.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, *PROMPTS, options, seeds=seeds, engine=engine()).ids
        for seeds in (SEEDS, SEEDS, [7, 8, 9])
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert model.training


def test_beam_search_is_that_of_transformers(tokenizer):
    model = tiny_llama(0).eval()
    options = GenerationOptions(max_new_tokens=6, num_beams=3)
    written = generate(model, tokenizer, *PROMPTS, options, seeds=SEEDS)
    expected = model.generate(
        input_ids=PROMPTS[0],
        attention_mask=PROMPTS[1],
        max_new_tokens=6,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    assert torch.equal(written.ids, expected[:, PROMPTS[0].shape[1] :])


def test_the_first_eos_belongs_to_the_completion_also_where_pad_is_eos():
    ids = torch.tensor([[4, 1, 1, 1], [1, 1, 1, 1], [4, 5, 6, 7], [4, 3, 1, 5]])
    assert completion_mask(ids, {1}).sum(-1).tolist() == [2, 1, 4, 3]
    assert completion_mask(ids, {1, 3}).sum(-1).tolist() == [2, 1, 4, 2]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "1 or more"),
        ("max_new_tokens", 10**9, "at most 16,777,216"),
        ("max_new_tokens", 2**24 + 1, "at most 16,777,216"),
        ("num_beams", 10**6, "at most 1,000"),
        ("num_beams", 1001, "at most 1,000"),
        ("temperature", -1.0, "0 \\(greedy\\) or more"),
        ("top_k", -1, "0 \\(keep all\\)"),
        ("top_p", 0.0, "above 0"),
        ("num_beams", 0, "1 or more"),
    ],
)
def test_wrong_options_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} is .*{expected}"):
        GenerationOptions(**{name: value})


def test_the_largest_and_the_smallest_options_are_allowed():
    GenerationOptions(max_new_tokens=2**24, num_beams=1000)
    GenerationOptions(max_new_tokens=1, num_beams=1, temperature=0, top_k=0, top_p=1)


def test_what_is_not_said_is_what_the_docs_say():
    docs = (ROOT / "docs" / "on_policy.md").read_text()
    said = r"at most (\d+) tokens, rollouts are sampled at temperature (\d+) from all\s+tokens"
    tokens, temperature = map(int, re.search(said, docs).groups())
    for options in (GenerationOptions(), SamplingOptions()):
        assert (options.max_new_tokens, options.num_beams) == (tokens, 1)
    assert SamplingOptions().temperature == temperature
    assert not SamplingOptions().truncates
    assert GenerationOptions().temperature == 0
    assert "`predict` is greedy" in docs


def test_beam_search_without_the_engine_that_has_it_is_refused():
    options = SamplingOptions(num_beams=2)
    student = StudentSpec.of(tiny_llama(0))
    for make in (
        lambda: OnPolicyGeneration(generation=options, engine=CachedSampler()),
        lambda: SFT(student=student, generation=options, engine=CachedSampler()),
    ):
        with pytest.raises(ValueError, match="no beam search; leave engine out, or choose Transf"):
            make()


@ENGINES
def test_completions_beyond_the_model_s_positions_are_refused_before_the_first_token(
    tokenizer, engine
):
    model = tiny_llama(0, max_position_embeddings=64)  # the longest prompt has 5 tokens
    refused = "prompts and max_new_tokens take up to 65 tokens, but the LlamaForCausalLM has 64"
    with pytest.raises(ValueError, match=refused):
        generate(
            model,
            tokenizer,
            *PROMPTS,
            GenerationOptions(max_new_tokens=60),
            seeds=SEEDS,
            engine=engine(),
        )
    written = generate(
        model,
        tokenizer,
        *PROMPTS,
        GenerationOptions(max_new_tokens=59),
        seeds=SEEDS,
        engine=engine(),
    )
    assert written.ids.shape[1] <= 59
    with pytest.raises(
        ValueError, match="up to 64 tokens, but the LlamaForCausalLM has 32 positions"
    ):
        generate(
            model,
            tokenizer,
            *PROMPTS,
            SamplingOptions(max_new_tokens=59),
            seeds=SEEDS,
            mixed_with=(tiny_llama(1, max_position_embeddings=32), 0.2),
        )
