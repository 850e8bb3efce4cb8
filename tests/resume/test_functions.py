"""Functions that a run was told, such as rewards: another one is refused on a resume."""

import json
import math
import operator
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from lightning_kd.resuming import Resumable, describe, differences


def of_a_factor(factor, power=1):
    def reward(completions):
        return [factor * len(c) ** power for c in completions]

    return reward


GAIN = 1.0


@pytest.mark.parametrize(
    ("saved", "now", "named"),
    [
        (lambda c: [1.0], lambda c: [2.0], ".code"),
        (lambda c: [len(c)], lambda c: [-len(c)], ".code"),
        (lambda c: [x in {1, 2} for x in c], lambda c: [x in {1, 3} for x in c], ".code"),
        (lambda c: [sum(x for x in c)], lambda c: [sum(-x for x in c)], ".code"),
        (lambda c: [min(c)], lambda c: [max(c)], ".code"),
        (lambda c, k=1: [k], lambda c, k=2: [k], ".defaults.k: 1 -> 2"),
        (of_a_factor(1.0), of_a_factor(0.5), ".values.factor: 1.0 -> 0.5"),
        (of_a_factor([1]), of_a_factor([2]), ".values.factor: "),
        (of_a_factor(of_a_factor), of_a_factor(len), ".values.factor"),
        *[
            (of_a_factor(before), of_a_factor(after), ".values.factor: ")
            for before, after in (
                ("a", "b"),
                ({"a"}, {"b"}),
                (b"a", b"b"),
                (re.compile("a"), re.compile("b")),
                (re.compile("a"), re.compile("a", re.IGNORECASE)),
                (np.float32(1), np.float32(2)),
                (np.ones(1), np.zeros(1)),
                (torch.ones(1), torch.zeros(1)),
                (partial(max, 1), partial(max, 2)),
                ({"a": {"b": 1}}, {"a": {"b": 2}}),
                ([lambda c: 1], [lambda c: 2]),
                (Path("a"), Path("b")),
            )
        ],
        (lambda c, answer: [answer], lambda c, rationale: [rationale], ".code"),
        (lambda prompt, c: [prompt], lambda c, prompt: [c], ".code"),
        (lambda c, *, a, b: a, lambda c, *, b, a: b, ".code"),
        (lambda c, *, a: [a], lambda c, *, b: [b], ".code"),
        (lambda *c: c, lambda **c: c, ".code"),
        (partial(lambda c, k: [1.0], k=1), partial(lambda c, k: [2.0], k=1), ".code"),
    ],
)
def test_functions_without_a_name_are_compared_by_what_they_do(saved, now, named):
    saved, now = describe([saved]), describe([now])
    assert json.loads(json.dumps(saved)) == saved
    found = list(differences(saved, now, "rewards"))
    assert len(found) == 1
    assert f"rewards[0]{named}" in found[0]


def test_the_same_function_without_a_name_is_itself_and_reads_what_it_reads(monkeypatch):
    def made():
        def of_itself(c):
            return of_itself(c[1:]) + GAIN if c else 0.0

        return of_itself, of_a_factor(SimpleNamespace(more=0)), lambda c: {1, 2, 3} | {*c}

    assert describe(made()) == describe(made())
    before = describe(made())
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    assert list(differences(before, describe(made()))) == ["[0].values.GAIN: 1.0 -> 2.0"]


@pytest.mark.parametrize(
    "reward",
    [lambda c: [GAIN * len(x) for x in c], lambda c: sorted(c, key=lambda x: GAIN)],
)
def test_what_a_comprehension_or_an_inner_function_reads_is_compared_too(reward, monkeypatch):
    before = describe(reward)
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    assert list(differences(before, describe(reward))) == ["values.GAIN: 1.0 -> 2.0"]


def of_a_script(source):
    """Return ``reward`` of a script, which no import finds."""
    names = {"__name__": "__main__"}
    exec(source, names)
    return names["reward"]


@pytest.mark.parametrize(
    "script",
    [
        "def h(c): return {}len(c)\ndef reward(c): return h(c)",
        "from functools import lru_cache\n@lru_cache\ndef reward(c): return {}len(c)",
        "class R:\n def f(self, c): return {}len(c)\nreward = R().f",
        "class R:\n def __call__(self, c): return {}len(c)\nreward = R()",
        "class B:\n def f(self, c): return {}len(c)\nclass R(B): pass\nreward = R().f",
        "class R:\n def __init__(self): self.k = {}1\n def f(self, c): return self.k\nreward = R().f",
        "class R:\n k = {}1\n def __call__(self, c): return self.k\nreward = R()",
        "def many(*fs): return lambda c: [f(c) for f in fs]\nreward = many(many(lambda c: {}1))",
        "def reward(c):\n try:\n  a = f()\n  {}g()\n except ValueError: return 0\n return a",
        "from functools import wraps\ndef scaled(f):\n @wraps(f)\n def scaled(c): return f(c)\n"
        " return scaled\n@scaled\ndef reward(c): return {}len(c)",
        "from functools import wraps\nimport statistics\ndef negated(f):\n @wraps(f)\n"
        " def g(c): return {}f(c)\n return g\nreward = negated(statistics.mean)",
    ],
)
def test_all_that_a_script_defines_for_a_reward_is_compared(script):
    before, same, after = (describe(of_a_script(script.format(s))) for s in ("", "", "-"))
    assert before == same
    assert list(differences(before, after))


def test_what_a_reward_reads_is_not_written_into_checkpoints():
    table = {f"question {number}": "secret" for number in range(1000)}
    known = json.dumps(describe(of_a_factor(table)))
    assert "secret" not in known
    assert len(known) < 1000


class Scorer:
    """Called, with what it does hidden."""

    def __init__(self, scale, module=None):
        self._scale, self._module = scale, module

    def __call__(self, c):
        return [self._scale]

    def reward(self, c):
        return [self._scale]


def test_objects_are_compared_by_what_they_hold():
    for member in (lambda scorer: scorer, lambda scorer: scorer.reward):
        before, same, after = (describe(member(Scorer(scale))) for scale in (1, 1, 2))
        assert before == same
        assert list(differences(before, after))


class Rewarded(Resumable, L.LightningModule):
    """A method with rewards."""

    def __init__(self, rewards):
        super().__init__()


def test_a_reward_may_read_the_module_that_it_belongs_to():
    def reward(c):
        module.log("reward", 1.0)
        return [1.0]

    module = Rewarded([reward])
    assert describe(module)["rewards"][0]["class"] == reward.__qualname__


def test_what_contains_itself_can_be_described():
    loop = []
    loop.append(loop)
    assert describe(of_a_factor(loop)) == describe(of_a_factor(loop))


def test_functions_of_one_name_in_two_modules_are_two():
    assert describe(math.pow) != describe(operator.pow)
