"""Killed with SIGKILL again and again, and resumed each time: bit for bit the run that was not."""

import pytest
import torch

from tests.resume import places
from tests.resume.kill_runs import (
    KILLED,
    METHODS,
    STRATEGIES,
    Kill,
    differences,
    killed,
    models,
    starts,
    uninterrupted,
    world_size,
)

pytestmark = pytest.mark.processes

ON_GPU = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []

SEQUENCES = (
    [
        Kill("checkpoint just in place", 2),
        Kill("micro-batch ended"),
        Kill("validation ended, not saved"),
    ],
    [Kill(places.MOMENT, 8, seconds=0.02), Kill("amid validation"), Kill("epoch ended")],
)
"""``python -m tests.resume.kill_runs`` tries many more."""

SECOND = {("supervised_kd", "ddp"), ("supervised_kd", "fsdp2"), ("gkd", "one"), ("minillm", "ddp")}
"""Whose kills are the second sequence: each method, strategy and setting meets both."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    models(folder)
    return folder


@pytest.mark.parametrize("strategy", [*STRATEGIES, *ON_GPU])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_several_times_goes_on_bit_for_bit(method, strategy, root):
    # Each method in each setting, and each strategy too.
    place = [*STRATEGIES, "cuda"].index(strategy)
    setting = KILLED[(METHODS.index(method) + place) % len(KILLED)]
    reference = uninterrupted(method, strategy, setting, root)
    number = int((method, strategy) in SECOND)
    story = killed(method, strategy, setting, root, number, SEQUENCES[number])
    assert len(story) == len(SEQUENCES[number]), story
    folder = root / f"{method}_{strategy}_{setting}_{number}"
    assert differences(reference, folder, world_size(strategy)) == [], story


@pytest.mark.parametrize("place", ["checkpoint half written", "checkpoint not yet in place"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(root, place):
    """The third file is the second time's first, whose bytes or name are still to come."""
    reference = uninterrupted("gkd", "one", "plain", root)
    number = places.FILES.index(place)
    killed("gkd", "one", "plain", root, number, [Kill(place, 3)])
    folder = root / f"gkd_one_plain_{number}"
    assert starts(folder) == [0, 3]
    assert differences(reference, folder, 1) == []
