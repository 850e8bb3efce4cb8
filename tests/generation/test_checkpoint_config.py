"""What a checkpoint's generation config asks for is not done, and is said."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from lightning_kd.generation import (
    CachedSampler,
    GenerationOptions,
    TransformersEngine,
    generate,
)
from lightning_kd.models import LoRA
from tests.support.toys import letter_tokenizer, tiny_llama

VOCABULARY, EOS = 5, 1
PROMPT = torch.tensor([2, 3, 2])
ENGINES = pytest.mark.parametrize("engine", [CachedSampler, TransformersEngine])

ASKED = {
    "repetition_penalty": 8.0,
    "min_p": 0.3,
    "suppress_tokens": [3],
    "begin_suppress_tokens": [2],
    "bad_words_ids": [[2], [3, 4]],
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 4,
    "no_repeat_ngram_size": 1,
    "sequence_bias": [[[2], 3.0], [[3, 2], -5.0]],
    "guidance_scale": 3.0,
    "exponential_decay_length_penalty": [1, 4.0],
    "min_new_tokens": 2,
    "min_length": 5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "max_length": 4,
    "return_dict_in_generate": True,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 5.0, "context_width": 1},
    "renormalize_logits": True,
    "cache_implementation": "static",
}
HARMLESS = {"max_length", "return_dict_in_generate", "cache_implementation"}


def saved(asked, directory="model"):
    """A model whose directory has a generation config, as any model from a hub may."""
    tiny_llama(0, vocab_size=VOCABULARY).double().save_pretrained(directory)
    path = Path(directory) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float64").eval()


def tokenizer():
    return letter_tokenizer("abc")


@torch.no_grad()
def enumerated(model, temperature=1.0):
    """The probability of every completion of two tokens, from plain forward passes."""

    def following(ids):
        return (model(ids[None]).logits[0, -1] / temperature).softmax(-1).tolist()

    first = following(PROMPT)
    result = {(EOS,): first[EOS]}
    for a, b in itertools.product(range(VOCABULARY), repeat=2):
        if a != EOS:
            result[a, b] = first[a] * following(torch.cat([PROMPT, torch.tensor([a])]))[b]
    assert sum(result.values()) == pytest.approx(1, abs=1e-9)
    return result


def generated_by(model, count, engine=None, **options):
    prompts = PROMPT.repeat(count, 1)
    options = GenerationOptions(max_new_tokens=2, **options)
    return generate(
        model,
        tokenizer(),
        prompts,
        torch.ones_like(prompts),
        options,
        seeds=range(count),
        engine=engine and engine(),
    )


ALONE = ["repetition_penalty", "min_p", "suppress_tokens", "bad_words_ids", "sequence_bias"]
ALONE += ["no_repeat_ngram_size", "guidance_scale", "typical_p", "forced_eos_token_id"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        (CachedSampler, "all"),
        (TransformersEngine, "all"),
        *((TransformersEngine, name) for name in ALONE),
    ],
)
def test_samples_have_the_model_s_own_distribution_and_its_recorded_log_probs(engine, name):
    model = saved(ASKED if name == "all" else {name: ASKED[name]})
    expected, count = enumerated(model), 3000
    written = generated_by(model, count, temperature=1.0, engine=engine)
    seen = dict.fromkeys(expected, 0)
    for ids, mask, log_probs in zip(written.ids, written.mask, written.log_probs, strict=True):
        completion = tuple(ids[mask].tolist())
        seen[completion] += 1
        assert log_probs.sum().exp().item() == pytest.approx(expected[completion], rel=1e-5)
    likely = [k for k, p in expected.items() if p * count >= 5]
    rare = [k for k in expected if k not in set(likely)]
    observed = np.array([*(seen[k] for k in likely), sum(seen[k] for k in rare)])
    wanted = np.array([*(expected[k] for k in likely), sum(expected[k] for k in rare)]) * count
    if wanted[-1] < 5:  # too few for the test's approximation: into the last likely one
        observed = np.append(observed[:-2], observed[-2:].sum())
        wanted = np.append(wanted[:-2], wanted[-2:].sum())
    assert len(observed) > 8
    assert stats.chisquare(observed, wanted * count / wanted.sum()).pvalue > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("engine", "num_beams"), [(CachedSampler, 1), (TransformersEngine, 1), (TransformersEngine, 3)]
)
def test_greedily_too_and_log_probs_are_those_at_temperature_1(engine, num_beams):
    model = saved(ASKED)
    written = generated_by(model, 2, engine=engine, num_beams=num_beams)
    expected = enumerated(model)
    for ids, mask, log_probs in zip(written.ids, written.mask, written.log_probs, strict=True):
        completion = tuple(ids[mask].tolist())
        assert log_probs.sum().exp().item() == pytest.approx(expected[completion], rel=1e-5)
        if num_beams == 1:
            first = max(range(VOCABULARY), key=lambda t: model(PROMPT[None]).logits[0, -1, t])
            assert completion[0] == first
        else:  # all that beams of this width can be left with: the best by mean log-probability
            best = max(expected, key=lambda k: np.log(expected[k]) / len(k))
            assert completion == best


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_s_own_config_is_there_again_afterwards(adapted):
    model = saved(ASKED)
    before = model.generation_config
    as_it_was = before.to_dict()
    around = LoRA(r=2).adapt(model).eval() if adapted else model
    generated_by(around, 2, engine=TransformersEngine, temperature=1.0)
    assert model.generation_config is before
    assert around.generation_config is before
    assert before.to_dict() == as_it_was
    if adapted:
        assert "generation_config" not in vars(around)


@ENGINES
def test_what_is_not_done_is_said_once_and_by_name(engine, caplog):
    model = saved(ASKED)
    with caplog.at_level("INFO"):
        for _ in range(2):
            generated_by(model, 2, engine=engine)
    notes = [r.getMessage() for r in caplog.records if "generation config of" in r.getMessage()]
    assert len(notes) == 1
    for name in ASKED.keys() - HARMLESS:
        assert f"{name} " in notes[0]
    for name in HARMLESS:
        assert f"{name} " not in notes[0]
    caplog.clear()
    with caplog.at_level("INFO"):
        generated_by(saved({"temperature": 1.0, "do_sample": True, "top_k": 0}, "plain"), 2)
    assert "generation config of" not in caplog.text


@ENGINES
def test_all_ends_of_the_generation_config_end_a_completion(engine):
    model = saved({"eos_token_id": [EOS, 3]})
    written = generated_by(model, 200, engine=engine, temperature=1.0)
    ends = [ids[mask].tolist()[-1] for ids, mask in zip(written.ids, written.mask, strict=True)]
    assert written.ended.tolist() == [last in {EOS, 3} for last in ends]
    assert {EOS, 3} <= set(ends)
