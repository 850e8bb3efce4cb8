"""The sampler on a device, beside greedy search of transformers and the CPU."""

import pytest
import torch

from lightning_kd.generation import (
    ContinuousBatchingSampler,
    GenerationOptions,
    Prompts,
    SamplingOptions,
    sample,
)
from tests.generation.test_sampler import other_models
from tests.support.toys import tiny_llama

NEW = 24


def prompts(device):
    """Padded on the left."""
    ids = torch.randint(2, 18, (6, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(5):
        mask[row, :row] = 0
    return ids.to(device), mask.to(device)


def written(model, device, options):
    ids, mask = prompts(device)
    seeds = range(len(ids))
    return sample([(model, 1.0)], ids, mask, options, eos_ids={1}, pad_id=0, seeds=seeds)


def test_the_most_likely_tokens_are_those_of_transformers(device):
    model = tiny_llama().to(device).eval()
    ids, mask = prompts(device)
    theirs = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )[:, ids.shape[1] :]
    ours = written(model, device, GenerationOptions(NEW, 0.0))
    assert ours.ids.device.type == device
    assert torch.where(ours.mask, ours.ids, 0).tolist() == theirs.tolist()


def test_what_is_sampled_is_what_the_cpu_samples(device):
    """Random numbers belong to the rows; in float64 round-off decides no token."""
    model = tiny_llama().double().eval()
    options = SamplingOptions(max_new_tokens=NEW)
    expected = written(model, "cpu", options)
    came = written(model.to(device), device, options)
    assert came.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(came.log_probs.cpu(), expected.log_probs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["one model", "mixture", "sliding window", "ends far apart"])
def test_a_static_cache_writes_what_a_dynamic_one_does(device, kind):
    """Through several shapes: the cache grows, and rows leave."""
    model = tiny_llama().double().eval().to(device)
    other = tiny_llama(1).double().eval().to(device)
    weighted = [(model, 0.7), (other, 0.3)] if kind == "mixture" else [(model, 1.0)]
    if kind == "sliding window":
        window = next(p.values[0] for p in other_models() if p.id == "sliding window")
        weighted = [(window.double().to(device), 1.0)]
    ids, mask = prompts(device)
    rows = 40 if kind == "ends far apart" else 6
    ids, mask = ids.repeat(7, 1)[:rows], mask.repeat(7, 1)[:rows]
    options = SamplingOptions(max_new_tokens=100)
    expected, came = (
        sample(weighted, ids, mask, options, eos_ids={1}, pad_id=0, seeds=range(rows), cache=cache)
        for cache in ("dynamic", "static")
    )
    assert came.ids.tolist() == expected.ids.tolist()
    for name in ("log_probs", "sampling_log_probs"):
        got, wanted = getattr(came, name), getattr(expected, name)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_what_is_not_recorded_is_an_error_on_a_device(device):
    """No warning comes: a step that could not be recorded would be one."""
    model = tiny_llama().to(device)
    given = [(model, 1.0)], *prompts(device), SamplingOptions(max_new_tokens=NEW)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        came = sample(*given, eos_ids={17}, pad_id=0, seeds=range(6), width=17, cache="static")
        assert came.ids.shape == (6, NEW)
    # In mixed precision weights are cast once, outside of what is recorded.
    with torch.autocast(device, torch.bfloat16):
        came = sample(*given, eos_ids={17}, pad_id=0, seeds=range(6), width=17, cache="static")
    assert came.ids.shape == (6, NEW)


def test_continuous_batching_samples_the_same(device):
    """Six rows through two slots, looked at as often as the device is."""
    model = tiny_llama().double().eval()
    options = SamplingOptions(max_new_tokens=NEW)
    expected = written(model, "cpu", options)
    given = Prompts(*prompts(device), eos_ids=frozenset({1}), pad_id=0)
    models = [(model.to(device), 1.0)]
    engine = ContinuousBatchingSampler(slots=2)
    came = engine.generate(given, options, seeds=range(6), models=models)
    assert came.ids.device.type == device
    assert came.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(came.log_probs.cpu(), expected.log_probs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_are_those_of_a_second_reading(device, dtype):
    model = tiny_llama().to(dtype).to(device).eval()
    ids, mask = prompts(device)
    came = written(model, device, SamplingOptions(max_new_tokens=NEW))
    whole = torch.cat([ids, came.ids], 1)
    real = torch.cat([mask, came.mask.long()], 1)
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(whole, attention_mask=real, position_ids=positions).logits.float()
    read = logits.log_softmax(-1)[:, ids.shape[1] - 1 : -1].gather(-1, came.ids[:, :, None])[..., 0]
    difference = (read - came.log_probs)[came.mask].abs()
    assert difference.max() < 0.25
    assert difference.mean() < 0.03
