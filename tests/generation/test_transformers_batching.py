"""Continuous batching of transformers, as an engine."""

import threading
import time

import pytest
import torch
from scipy import stats

from lightning_kd import (
    CachedSampler,
    GenerationOptions,
    SamplingOptions,
    TransformersContinuousBatching,
)
from lightning_kd.generation import transformers_batching
from lightning_kd.models import LoRA
from tests.generation.test_continuous import prompts_of
from tests.generation.test_sampler import other_models
from tests.support.toys import tiny_llama

pytestmark = pytest.mark.slow

LENGTHS = [2, 5, 1, 7, 3, 3, 2, 6, 1, 4]


def generated(engine, model, options, prompts, seeds=None):
    seeds = range(len(prompts.ids)) if seeds is None else seeds
    return engine.generate(prompts, options, seeds=seeds, models=[(model, 1.0)])


def adapted():
    model = LoRA(r=2).adapt(tiny_llama(3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


MODELS = {
    "llama": lambda: tiny_llama(3).eval(),
    "eager attention": lambda: tiny_llama(3, attn_implementation="eager").eval(),
    "sliding window": lambda: next(p.values[0] for p in other_models() if p.id == "sliding window"),
    "adapters": adapted,
}


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("name", MODELS)
def test_the_most_likely_tokens_are_those_of_the_cached_sampler(name, slots):
    model, prompts = MODELS[name](), prompts_of(LENGTHS, eos_ids=(1, 5))
    options = GenerationOptions(max_new_tokens=20)
    implementation = model.config._attn_implementation
    expected = generated(CachedSampler(), model, options, prompts)
    got = generated(TransformersContinuousBatching(slots), model, options, prompts)
    for field in ("ids", "mask", "ended"):
        assert torch.equal(getattr(got, field), getattr(expected, field)), field
    torch.testing.assert_close(got.log_probs, expected.log_probs, atol=1e-4, rtol=0)
    assert torch.equal(got.log_probs, got.sampling_log_probs)
    assert model.config._attn_implementation == implementation


def test_log_probs_are_float32_under_another_default_type():
    """The trainer's precision bf16-true sets it while a window is generated."""
    model, prompts, options = tiny_llama(3).eval(), prompts_of([2, 5, 3]), GenerationOptions(6)
    expected = generated(CachedSampler(), model, options, prompts)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = generated(TransformersContinuousBatching(2), model, options, prompts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.log_probs.dtype == torch.float32
    torch.testing.assert_close(got.log_probs, expected.log_probs, atol=1e-4, rtol=0)


def test_it_leaves_everything_as_it_was_and_repeats_itself():
    model, prompts = tiny_llama(0).train(), prompts_of(LENGTHS)
    options = SamplingOptions(max_new_tokens=12)
    state, threads = torch.random.get_rng_state(), threading.active_count()
    engine = TransformersContinuousBatching(slots=4)
    first, again, other = (
        generated(engine, model, options, prompts, [seed] * 10) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert threading.active_count() == threads
    assert model.training
    assert torch.equal(first.ids, again.ids)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_new_weights_are_those_of_the_next_window():
    model, prompts = tiny_llama(0).eval(), prompts_of(LENGTHS)
    options, engine = GenerationOptions(max_new_tokens=12), TransformersContinuousBatching()
    before = generated(engine, model, options, prompts)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tiny_llama(7).parameters(), strict=True):
            parameter.copy_(other)
    after, expected = (
        generated(each, model, options, prompts) for each in (engine, CachedSampler())
    )
    assert torch.equal(after.ids, expected.ids)
    assert after.ids.shape != before.ids.shape or not torch.equal(after.ids, before.ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_have_the_distribution_of_the_model(temperature):
    model = tiny_llama(0, vocab_size=5).eval()
    prompts = prompts_of([1] * 3000)
    prompts.ids.fill_(2)
    options = SamplingOptions(max_new_tokens=1, temperature=temperature)
    got = generated(TransformersContinuousBatching(slots=500), model, options, prompts)
    with torch.no_grad():
        expected = (model(prompts.ids[:1]).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(got.ids[:, 0], minlength=5)
    assert expected.min() * 3000 > 5
    share = (
        expected.double() / expected.double().sum()
    )  # of float32, the sum is off by its rounding
    assert stats.chisquare(counts, share * 3000).pvalue > 1e-3
    taken = expected.log()[got.ids[:, 0]]
    torch.testing.assert_close(got.log_probs[:, 0], taken, atol=1e-5, rtol=0)


def test_no_token_beyond_the_shared_vocabulary_is_drawn():
    prompts = prompts_of(LENGTHS)
    narrow = type(prompts)(prompts.ids, prompts.mask, prompts.eos_ids, 0, width=6)
    options = SamplingOptions(max_new_tokens=16, temperature=5.0)
    got = generated(TransformersContinuousBatching(), tiny_llama(0).eval(), options, narrow)
    assert got.ids[got.mask].max() == 5


# What it cannot do.


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.9}])
def test_tokens_that_are_cut_off_are_refused_by_name(cut):
    options = SamplingOptions(max_new_tokens=4, **cut)
    with pytest.raises(
        ValueError, match=r"top_k \d and top_p .*choose engine: ContinuousBatchingS"
    ):
        generated(TransformersContinuousBatching(), tiny_llama(0), options, prompts_of([2]))


def test_shards_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(transformers_batching, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in shards.*engine: CachedSampler"):
        generated(
            TransformersContinuousBatching(), tiny_llama(0), GenerationOptions(), prompts_of([2])
        )


@pytest.mark.parametrize("slots", [0, -1, 2.5, True, "8"])
def test_slots_are_a_positive_whole_number(slots):
    with pytest.raises(ValueError, match=r"slots is .*; it must be a whole number, 1 or more"):
        TransformersContinuousBatching(slots)


@pytest.mark.parametrize("timeout", [0, -1.0, "8", float("nan")])
def test_the_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(ValueError, match=r"timeout is .*; it must be a number of seconds above 0"):
        TransformersContinuousBatching(timeout=timeout)


# What can go wrong in it.


def test_an_error_in_its_thread_is_raised_and_the_thread_has_ended():
    model, threads = tiny_llama(0).eval(), threading.active_count()

    def fail(*_):
        raise RuntimeError("the forward pass is broken")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"continuous batching of transformers .*is broken"):
        generated(TransformersContinuousBatching(), model, GenerationOptions(), prompts_of(LENGTHS))
    handle.remove()
    assert threading.active_count() == threads


def test_a_thread_that_hangs_is_waited_for_no_longer_than_the_timeout():
    model, threads = tiny_llama(0).eval(), threading.active_count()
    go_on = threading.Event()
    handle = model.register_forward_pre_hook(lambda *_: go_on.wait(60) and None)
    threading.Timer(2.0, go_on.set).start()  # so that it can be stopped
    with pytest.raises(
        RuntimeError, match=r"gave no further completion within 0\.5 s, with 0 of 10"
    ):
        generated(
            TransformersContinuousBatching(timeout=0.5),
            model,
            GenerationOptions(),
            prompts_of(LENGTHS),
        )
    handle.remove()
    assert threading.active_count() == threads


class Stuck:
    """A manager whose thread does not stop."""

    stopped = 0

    def stop(self, **_):
        self.stopped += 1

    def is_running(self):
        return True


def test_a_thread_that_does_not_stop_is_an_error():
    manager = Stuck()
    with (
        pytest.raises(RuntimeError, match="did not stop within 30 s"),
        transformers_batching._running(manager),
    ):
        time.sleep(0)
    assert manager.stopped == 1
