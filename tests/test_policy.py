import numpy as np
import pytest
import torch

from lightning_kd.policy import (
    CISPO,
    ImportanceSampling,
    PPOClip,
    discounted_returns,
    leave_one_out,
    tokens_left,
    whiten,
    whitening_statistics,
)


def backwards(rewards, gamma):
    """The recursion, one token at a time, in NumPy."""
    result, following = np.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[-1])):
        following = rewards[..., t] + gamma * following
        result[..., t] = following
    return result


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_returns_are_those_of_the_recursion(gamma, length):
    rewards = np.random.default_rng(0).normal(size=(2, length))
    got = discounted_returns(torch.tensor(rewards), gamma)
    np.testing.assert_allclose(got, backwards(rewards, gamma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_of_a_long_sequence_have_their_closed_form(gamma, dtype):
    """Rewards of 1: (1 - gamma^n) / (1 - gamma), finite where gamma^n has long underflown."""
    length = 32_768
    got = discounted_returns(torch.ones(1, length, dtype=dtype), gamma)[0].double()
    left = torch.arange(length, 0, -1, dtype=torch.float64)
    expected = (1 - gamma**left) / (1 - gamma)
    assert got.isfinite().all()
    assert ((got - expected) / expected).abs().max() < 1e-6


def test_nothing_outside_the_mask_is_counted_or_changed():
    mask = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
    assert tokens_left(mask).tolist() == [[0, 3, 2, 1, 0], [0, 0, 1, 0, 0]]
    values = torch.tensor([[9.0, 1, 2, 3, 9], [9, 9, 4, 9, 9]])
    whitened = whiten(values, mask, whitening_statistics(values, mask))
    assert whitened[~mask].abs().sum() == 0
    chosen = whitened[mask].double().numpy()
    assert chosen.mean() == pytest.approx(0, abs=1e-6)
    assert chosen.std() == pytest.approx(1, abs=1e-6)


def test_whitening_over_padded_rows_counts_the_padding_as_zeros():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2, 0], [4, 0, 0]])
    whitened = whiten(values, mask, whitening_statistics(values, mask), count=2 * 4)
    padded = np.array([1.0, 2, 4, 0, 0, 0, 0, 0])
    expected = (padded[:3] - padded.mean()) / np.sqrt(padded.var() + 1e-8)
    np.testing.assert_allclose(whitened[mask], expected, rtol=1e-6)


def test_equal_values_whiten_to_zero():
    mask = torch.ones(2, 2, dtype=torch.bool)
    values = torch.zeros(2, 2)
    assert whiten(values, mask, whitening_statistics(values, mask)).abs().sum() == 0


def test_one_value_alone_is_its_own_mean_and_none_is_no_error():
    values = torch.tensor([[5.0, 7.0]])
    for mask in (torch.tensor([[True, False]]), torch.tensor([[False, False]])):
        assert whiten(values, mask, whitening_statistics(values, mask)).tolist() == [[0, 0]]


def test_the_baseline_is_the_mean_of_the_others_on_all_ranks():
    """This rank has the first, second and last of the pool; rank 1 the rest of their groups."""
    pool = torch.tensor([1.0, 0.0, 2.0, 7.0, 4.0], dtype=torch.float64)
    groups = torch.tensor([3, 3, 3, 5, 6])
    own = [0, 1, 4]
    got = leave_one_out(pool[own], groups[own], pool, groups)
    assert got.tolist() == [1 - (0 + 2) / 2, 0 - (1 + 2) / 2, 4]
    everyone = leave_one_out(pool, groups, pool, groups)
    assert everyone[:3].sum().abs() < 1e-15
    # A group mean with the completion itself is the same, times (G - 1) / G.
    torch.testing.assert_close(everyone[:3] * 2 / 3, pool[:3] - pool[:3].mean())


def test_each_of_two_is_the_others_baseline():
    pair, group = torch.tensor([5.0, 2.0]), torch.tensor([0, 0])
    assert leave_one_out(pair, group, pair, group).tolist() == [3.0, -3.0]


RATIOS = torch.tensor([0.5, 0.9, 1.0, 1.1, 3.0], dtype=torch.float64)
OLD = torch.full_like(RATIOS, -2.0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_ppo_stops_the_gradient_only_where_it_would_go_further_away(advantage):
    log_probs = (OLD + RATIOS.log()).requires_grad_()
    advantages = torch.full_like(RATIOS, advantage)
    loss = PPOClip(0.2, 0.2)(log_probs, OLD, advantages)
    expected = [-min(r * advantage, np.clip(r, 0.8, 1.2) * advantage) for r in RATIOS.tolist()]
    np.testing.assert_allclose(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    stopped = [4] if advantage > 0 else [0]
    for place, ratio in enumerate(RATIOS.tolist()):
        wanted = 0 if place in stopped else -ratio * advantage
        assert gradient[place].item() == pytest.approx(wanted)


def test_the_unclipped_and_the_weight_clipped_surrogates():
    advantages = torch.full_like(RATIOS, 2.0)
    for surrogate, weights in (
        (ImportanceSampling(), RATIOS),
        (CISPO(ceiling=2.0), RATIOS.clamp(max=2.0)),
        (CISPO(ceiling=0.6), RATIOS.clamp(max=0.6)),
    ):
        log_probs = (OLD + RATIOS.log()).requires_grad_()
        (gradient,) = torch.autograd.grad(surrogate(log_probs, OLD, advantages).sum(), log_probs)
        torch.testing.assert_close(gradient, -weights * 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOClip(low=1.5), "low must lie in"),
        (lambda: PPOClip(high=-0.1), "high be >= 0"),
        (lambda: CISPO(ceiling=0), "ceiling is 0; it must be positive"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
