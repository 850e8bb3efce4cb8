import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd.divergences import heads
from lightning_kd.divergences.heads import head_of


def sorted_head(log_probs, mu):
    """The definition, in float64: a stable sort, and the longest prefix of at most mu."""
    mask = np.zeros(log_probs.shape, dtype=bool)
    for row, own in zip(mask, log_probs.double().numpy(), strict=True):
        order = np.argsort(-own, kind="stable")
        size = int((np.exp(own[order]).cumsum() <= mu).sum())
        row[order[: max(1, size)]] = True
    return torch.from_numpy(mask)


def is_decided(log_probs, mu):
    """Whether no prefix is so near mu that rounding decides."""
    ranked = log_probs.double().sort(-1, descending=True).values.exp().cumsum(-1)
    return bool(((ranked - mu).abs() > 1e-6).all())


@pytest.fixture(params=["as it is", "few and coarse"])
def sizes(request, monkeypatch):
    """Also so that small vocabularies have large heads, several tokens in a bucket, and a last one."""
    if request.param == "few and coarse":
        monkeypatch.setattr(heads, "_FEW", 3)
        monkeypatch.setattr(heads, "_BUCKETS", 7)
        monkeypatch.setattr(heads, "_PER_NAT", 2)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    excluded=st.sampled_from([0.0, 0.5]),
    mu=st.floats(0.01, 0.99),
    coarse=st.booleans(),
)
def test_the_head_is_that_of_a_stable_sort(seed, width, spread, dtype, excluded, mu, coarse):
    draws = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(4, width, generator=draws)).to(dtype)
    out = torch.rand(4, width, generator=draws) < excluded
    out[:, seed % width] = False
    wide = logits if dtype == torch.float64 else logits.float()
    log_probs = wide.masked_fill(out, -torch.inf).log_softmax(-1)
    if not is_decided(log_probs, mu):
        return
    with pytest.MonkeyPatch.context() as patch:
        if coarse:
            for name, value in {"_FEW": 3, "_BUCKETS": 7, "_PER_NAT": 2}.items():
                patch.setattr(heads, name, value)
        found = head_of(log_probs, mu)
    assert torch.equal(found, sorted_head(log_probs, mu))


@pytest.mark.parametrize("mu", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_large_and_small_heads_of_a_large_vocabulary(spread, mu):
    draws = torch.Generator().manual_seed(1)
    logits = (spread * torch.randn(3, 20_000, generator=draws)).bfloat16().float()
    log_probs = logits.log_softmax(-1)
    expected = sorted_head(log_probs, mu)
    found = head_of(log_probs, mu)
    if spread < 1:
        assert expected.sum(-1).max() > heads._FEW  # both ways of finding it are taken
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("sizes")
def test_all_tokens_are_in_the_head_where_they_have_no_more_than_mu_in_all():
    """Of a distribution cut to a part of its tokens."""
    log_probs = torch.full((2, 40), 0.01).log()
    log_probs[:, 3] = -torch.inf
    assert head_of(log_probs, 0.5).all()


@pytest.mark.usefixtures("sizes")
def test_any_number_of_axes():
    log_probs = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = head_of(log_probs, 0.6)
    assert found.shape == (2, 3, 50)
    assert torch.equal(found.reshape(6, 50), sorted_head(log_probs.reshape(6, 50), 0.6))


@pytest.mark.usefixtures("sizes")
def test_where_rounding_decides_a_single_token_is_in_question():
    """Sums in another order differ in the last digit; no tail enters the head for it."""
    log_probs = torch.full((1, 1000), 1e-3).log()
    for mu in (0.1, 0.3, 0.7):
        expected = round(1000 * mu)
        assert abs(int(head_of(log_probs, mu).sum()) - expected) <= 1
