"""Phases of a run that a timeout report names."""

import lightning as L
import pytest
from lightning.pytorch.strategies import Strategy

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.callbacks.timeout_report import _PHASES
from lightning_kd.modules import DistillationModule


@pytest.mark.parametrize("function", _PHASES)
def test_every_phase_is_that_of_a_function_that_exists(function):
    owners = (L.Callback, Strategy, DistillationModule, OnPolicyGeneration)
    assert any(hasattr(owner, function) for owner in owners)
