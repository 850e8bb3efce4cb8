"""Lengths of windows, their trend, and the warning when they run away."""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_kd.callbacks.rollouts.lengths import LengthHistory, WindowLengths
from lightning_kd.callbacks.rollouts.runaway import RunawayWarning
from lightning_kd.evaluation import repeated_ngrams
from lightning_kd.generation import Completions

ALONE = SimpleNamespace(sum_over_ranks=lambda values: values)


def completions(*rows, end=1):
    return Completions.of_tokens(rows, eos_ids={end}, pad_id=0)


def test_a_window_is_counted_by_hand():
    history = LengthHistory(4)
    history.add(ALONE, completions([5, 6, 7, 8], [5, 1], [1], [5, 6, 1]), window=3, step=7)
    (window,) = history.last
    assert window == WindowLengths(
        window=3, step=7, length=10 / 4, text=7 / 4, truncated=1 / 4, empty=1 / 4
    )


def test_all_ranks_count():
    """A second rank, with two completions of 4 tokens that do not end and two that are empty."""
    other = torch.tensor([4.0 + 4 + 1 + 1, 2, 2, 4]).double()
    pair = SimpleNamespace(sum_over_ranks=lambda values: values + other)
    history = LengthHistory(4)
    history.add(pair, completions([5, 6, 7, 8], [5, 1], [1], [5, 6, 1]), window=0, step=0)
    (window,) = history.last
    assert (window.length, window.text) == (20 / 8, 15 / 8)
    assert (window.truncated, window.empty) == (3 / 8, 3 / 8)


def test_the_trend_is_the_slope_of_the_least_squares_line():
    history, rng = LengthHistory(5), np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 9, 12))
    lengths = rng.integers(1, 30, 12)
    for number, (step, length) in enumerate(zip(steps, lengths, strict=True)):
        history.add(ALONE, completions([5] * length), window=number, step=int(step))
        seen = slice(max(0, number - 4), number + 1)
        if number < 2:
            assert history.trend() is None
        else:
            slope = np.polyfit(steps[seen].astype(float), lengths[seen].astype(float), 1)[0]
            assert history.trend() == pytest.approx(100 * slope, rel=1e-9)


def test_a_window_that_is_generated_again_takes_its_own_place():
    """As by a run that was broken off in a window's first step, and resumed before it."""
    history = LengthHistory(5)
    for window, length in enumerate((3, 5, 9)):
        history.add(ALONE, completions([5] * length), window=window, step=window)
    restored = LengthHistory(5)
    restored.load_state_dict(history.state_dict())
    restored.add(ALONE, completions([5] * 9), window=2, step=2)
    assert restored.state_dict() == history.state_dict()
    restored.add(ALONE, completions([5] * 4), window=1, step=1)
    assert [each.length for each in restored.last] == [3, 4]


def test_fewer_windows_are_kept_if_fewer_are_asked_for():
    history = LengthHistory(5)
    for window in range(5):
        history.add(ALONE, completions([5]), window=window, step=window)
    fewer = LengthHistory(4)
    fewer.load_state_dict(history.state_dict())
    assert [each.window for each in fewer.last] == [1, 2, 3, 4]


def test_repetitions_are_counted_one_by_one():
    rng = np.random.default_rng(1)
    for length in (0, 1, 3, 4, 5, 60):
        row = rng.integers(0, 3, length).tolist()
        grams = [row[i : i + 4] for i in range(length - 3)]
        again = sum(grams[i] in grams[:i] for i in range(len(grams)))
        assert repeated_ngrams(row, 4) == again
    assert again > 10


# The warning.


def watched(windows, size=4, limit=0.5, watch=None, start=0):
    """The warnings at windows of (mean length, share cut, share empty), and what watches."""
    history = LengthHistory(size)
    watch, said = watch or RunawayWarning(limit, 64), []
    for number, (length, cut, empty) in enumerate(windows, start):
        text = length - (1 - cut)
        history.last.append(WindowLengths(number, number, length, text, cut, empty))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.look(history)
        said += [(number, str(warning.message)) for warning in caught]
    return said, watch


SOUND = {
    "steady": [(20, 0.1, 0.0)] * 30,
    "noise": [(20 + 3 * (-1) ** n, 0.1 + 0.05 * (n % 3), 0.02 * (n % 2)) for n in range(30)],
    "growing, and ending": [(10 + 2 * n, 0.05, 0.0) for n in range(25)],
    "half of them cut, always": [(50 + n % 3, 0.55, 0.0) for n in range(30)],
    "one token, always": [(2, 0.0, 0.0)] * 30,
    "a bad window": [(20, 0.0, 0.0)] * 10 + [(64, 1.0, 0.0)] + [(20, 0.0, 0.0)] * 10,
    "shrinking, to a word": [(max(4, 30 - n), 0.0, 0.0) for n in range(40)],
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_run_is_not_warned_of(case):
    assert watched(SOUND[case])[0] == []


RUNAWAYS = {
    "all at once": [(20, 0.1, 0.0)] * 6 + [(64, 1.0, 0.0)] * 20,
    "slowly": [(20 + n, n / 44, 0.0) for n in range(45)],
    "from the first on": [(64, 1.0, 0.0)] * 20,
    "almost from the first on": [(63, 0.95, 0.0)] * 20,
}


@pytest.mark.parametrize("case", RUNAWAYS)
def test_completions_that_never_end_are_warned_of_once(case):
    ((number, message),) = watched(RUNAWAYS[case])[0]
    assert number < {"slowly": 45}.get(case, 10)
    rate, length = (
        float(re.search(rf"rollout/{name} is ([\d.]+)", message)[1])
        for name in ("truncation_rate", "length_mean")
    )
    newer = RUNAWAYS[case][number - 1 : number + 1]
    assert rate == pytest.approx(np.mean([cut for _, cut, _ in newer]), abs=0.006)
    assert length == pytest.approx(np.mean([length for length, _, _ in newer]), abs=0.06)
    for remedy in (
        "EOS",
        "on_policy.truncated: mask",
        "model.optimizer.lr",
        "max_new_tokens is 64",
    ):
        assert remedy in message


COLLAPSES = {
    "to nothing": [(20, 0.0, 0.0)] * 6 + [(1.2, 0.0, 0.8)] * 20,
    "empty from the first on": [(1.3, 0.0, 0.7)] * 20,
    "to one token": [(9, 0.0, 0.0)] * 6 + [(2, 0.0, 0.0)] * 20,
    "slowly": [(20 - 0.25 * n, 0.0, 0.0) for n in range(75)],
}


@pytest.mark.parametrize("case", COLLAPSES)
def test_completions_that_collapse_are_warned_of_once(case):
    ((_, message),) = watched(COLLAPSES[case])[0]
    assert "rollout/empty_rate is" in message
    assert "on_policy.truncated: keep" in message


def test_a_limit_of_1_never_warns_of_length():
    assert watched(RUNAWAYS["from the first on"], limit=1.0)[0] == []


def test_it_warns_again_after_it_was_well_for_as_many_windows():
    good, bad = [(20, 0.1, 0.0)], [(64, 1.0, 0.0)]
    briefly, for_long = bad * 6 + good * 2 + bad * 6, bad * 6 + good * 12 + bad * 6
    assert len(watched(good * 6 + briefly)[0]) == 1
    assert len(watched(good * 6 + for_long)[0]) == 2


def test_a_resumed_run_does_not_warn_again():
    said, watch = watched(RUNAWAYS["all at once"][:12])
    assert len(said) == 1
    restored = RunawayWarning(0.5, 64)
    restored.load_state_dict(watch.state_dict())
    rest = RUNAWAYS["all at once"][12:]
    assert watched(rest, watch=restored, start=8)[0] == []
    assert len(watched(rest, start=8)[0]) == 1
