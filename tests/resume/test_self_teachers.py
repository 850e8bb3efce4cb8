"""A student that its own average teaches, killed and resumed: the average goes on bit for bit."""

import pytest
import torch

from tests.resume.kill_runs import (
    STRATEGIES,
    Kill,
    differences,
    killed,
    models,
    newest,
    starts,
    uninterrupted,
    world_size,
)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    models(folder)
    return folder


def averages(folder):
    place = newest(folder)
    place = place / "meta.pt" if place.is_dir() else place
    (found,) = torch.load(place, weights_only=True)["self_teachers"]
    return found


@pytest.mark.parametrize("strategy", [*STRATEGIES, "directory"])
def test_an_average_that_is_killed_goes_on_bit_for_bit(strategy, root):
    reference = uninterrupted("sdft", strategy, "plain", root)
    story = killed("sdft", strategy, "plain", root, 0, [Kill("checkpoint just in place", 2)])
    folder = root / f"sdft_{strategy}_plain_0"
    assert starts(folder)[1] > 0, story
    assert differences(reference, folder, world_size(strategy)) == [], story
    whole, resumed = averages(root / f"sdft_{strategy}_plain"), averages(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
