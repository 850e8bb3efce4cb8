"""Continuous batching against the sampler that generates all rows together."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from lightning_kd import (
    GKD,
    CachedSampler,
    ContinuousBatchingSampler,
    GenerationOptions,
    Prompts,
    SamplingOptions,
)
from lightning_kd.generation import cache, continuous, decoder
from tests.callbacks.test_on_policy_generation import Saves, fit
from tests.generation.test_engine import models
from tests.generation.test_sampler import Forwarded, other_models
from tests.support.toys import tiny_llama

LLAMA = tiny_llama(0).double().eval()
OTHER = tiny_llama(1).double().eval()


def prompts_of(lengths, *, eos_ids=(1,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), widest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, widest - length :] = torch.randint(2, 18, (length,), generator=generator)
        mask[row, widest - length :] = 1
    return Prompts(ids, mask, eos_ids=frozenset(eos_ids), pad_id=0)


def both(prompts, options, slots, weighted):
    seeds = [100 + row for row in range(len(prompts.ids))]
    return [
        engine.generate(prompts, options, seeds=seeds, models=weighted)
        for engine in (CachedSampler(), ContinuousBatchingSampler(slots))
    ]


def assert_same(expected, got, atol=1e-9):
    for name in ("ids", "mask", "ended"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("log_probs", "sampling_log_probs"):
        values = getattr(got, name)
        torch.testing.assert_close(values, getattr(expected, name), atol=atol, rtol=0)
        assert not values.is_inference()


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=14),
    slots=st.integers(1, 6),
    ends=st.sets(st.integers(1, 17), max_size=4),
    longest=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    between=st.sampled_from([1, 3, 8]),
    mixed=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_text_of_a_row_is_that_of_the_cached_sampler(
    monkeypatch, lengths, slots, ends, longest, temperature, between, mixed, seed
):
    monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", between)
    prompts = prompts_of(lengths, eos_ids=ends, seed=seed)
    options = SamplingOptions(max_new_tokens=longest, temperature=temperature)
    weighted = [(LLAMA, 0.7), (OTHER, 0.3)] if mixed and temperature > 0 else [(LLAMA, 1.0)]
    assert_same(*both(prompts, options, slots, weighted))


PLAIN = [p for p in other_models() if p.id != "sliding window"]


@pytest.mark.parametrize("model", PLAIN)
def test_every_kind_of_position_and_adapters_write_the_same(model):
    prompts = prompts_of([2, 5, 1, 7, 3, 3, 2, 6, 1, 4], eos_ids=(1, 5, 9))
    options = SamplingOptions(max_new_tokens=20)
    if model.config.model_type == "bloom":  # in float64, padding makes its attention NaN
        assert_same(*both(prompts, options, 3, [(model, 1.0)]), atol=1e-5)
    else:
        assert_same(*both(prompts, options, 3, [(model.double(), 1.0)]))


@pytest.mark.slow
def test_random_numbers_of_a_long_row_go_on_where_they_ended():
    """Rows of 600 tokens use up three blocks of numbers, each from its own start."""
    model = tiny_llama(0, max_position_embeddings=640).double().eval()
    prompts = prompts_of([2, 5, 3], eos_ids=())
    options = SamplingOptions(max_new_tokens=600)
    assert_same(*both(prompts, options, 2, [(model, 1.0)]))


def test_a_row_that_has_ended_does_not_run_out_of_the_positions(monkeypatch):
    """It stays in its slot for eight tokens, and one of 4 + 6 learned positions follows no other."""
    monkeypatch.setitem(decoder._BETWEEN_LOOKS, "cpu", 8)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=10, vocab_size=18)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    prompts = prompts_of([4, 4, 2, 4, 1], eos_ids=())
    assert_same(*both(prompts, SamplingOptions(max_new_tokens=6), 2, [(model, 1.0)]))


def unequal():
    """64 rows of which most end early and a few late."""
    return prompts_of([3] * 64, eos_ids=(1,))


def test_slots_are_kept_full():
    """Each token costs at most 1.2 forward ones, in far fewer passes than part after part takes."""
    model = tiny_llama(0).eval()
    options = SamplingOptions(max_new_tokens=128)
    prompts, calls = unequal(), {}
    for name, engine in (("parts", CachedSampler()), ("slots", ContinuousBatchingSampler(8))):
        counter, passes = Forwarded(model), []
        handle = model.register_forward_pre_hook(lambda *_, p=passes: p.append(None))
        size = 8 if name == "parts" else 64
        written = [
            engine.generate(
                Prompts(prompts.ids[part], prompts.mask[part], prompts.eos_ids, 0),
                options,
                seeds=range(part.start, part.stop),
                models=[(model, 1.0)],
            )
            for part in (slice(start, start + size) for start in range(0, 64, size))
        ]
        calls[name] = len(passes)
        handle.remove()
        counter.handle.remove()
        generated = sum(int(part.mask.sum()) for part in written)
        assert counter.tokens - prompts.ids.numel() <= 1.2 * generated
    assert calls["slots"] < 0.7 * calls["parts"]


def test_the_cache_holds_as_many_rows_as_there_are_slots(monkeypatch):
    held = []
    move = cache.PreallocatedLayer._move

    def watched(layer, keys, values):
        move(layer, keys, values)
        held.append(layer._all_keys.shape)

    monkeypatch.setattr(cache.PreallocatedLayer, "_move", watched)
    ContinuousBatchingSampler(8).generate(
        unequal(), SamplingOptions(max_new_tokens=100), seeds=range(64), models=[(LLAMA, 1.0)]
    )
    assert max(shape[0] for shape in held) == 8
    assert max(shape[-2] for shape in held) <= cache.longest_allocation(3, 100)


def test_a_process_alone_is_all_that_continuous_batching_generates_for(monkeypatch):
    monkeypatch.setattr(continuous, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in shards.*engine: CachedSampler"):
        both(prompts_of([2]), SamplingOptions(max_new_tokens=2), 1, [(LLAMA, 1.0)])


@pytest.mark.parametrize("model", [p for p in other_models() if p.id == "sliding window"])
def test_a_sliding_window_is_refused_by_name(model):
    with pytest.raises(ValueError, match=r"keeps DynamicSlidingWindowLayer.*engine: CachedSampler"):
        ContinuousBatchingSampler(2).generate(
            prompts_of([2, 3]), SamplingOptions(), seeds=[1, 2], models=[(model, 1.0)]
        )


def test_a_model_without_a_cache_is_sent_to_transformers():
    config = MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="keeps no key-value cache; choose engine: Transformers"):
        ContinuousBatchingSampler(2).generate(
            prompts_of([2, 3]), SamplingOptions(), seeds=[1, 2], models=[(model, 1.0)]
        )


@pytest.mark.parametrize("slots", [0, -1, 2.5, True, "8"])
def test_slots_are_a_positive_whole_number(slots):
    with pytest.raises(ValueError, match="it must be a whole number, 1 or more"):
        ContinuousBatchingSampler(slots)


def test_a_truncated_mixture_is_refused():
    with pytest.raises(ValueError, match="importance weight would be 0 or unbounded"):
        ContinuousBatchingSampler().generate(
            prompts_of([2]),
            GenerationOptions(),
            seeds=[1],
            models=[(LLAMA, 0.5), (OTHER, 0.5)],
        )


def test_a_resumed_run_may_have_another_number_of_slots(tmp_path):
    fit(GKD(**models()), options={"engine": ContinuousBatchingSampler(2)}, more=[Saves(tmp_path)])
    options = {"engine": ContinuousBatchingSampler(3)}
    _, seen = fit(GKD(**models()), options=options, ckpt=tmp_path / "step1.ckpt")
    assert len(seen.batches) == 1
