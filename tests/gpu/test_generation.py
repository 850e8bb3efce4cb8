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
