"""Metrics of distributions that are in no evaluation and no step."""

import math

import pytest
import torch

from lightning_kd.evaluation import DistributionMetrics


def test_a_student_alone_is_compared_with_nobody():
    metrics, targets = DistributionMetrics(), torch.tensor([4, -100, 2])
    values = torch.tensor([[1.0, 99.0, 3.0], [0.5, 99.0, 0.7]])  # nats of its text, and its entropy
    metrics.update(values, targets)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx({"perplexity": math.exp(2), "student_entropy": 0.6})


def test_nothing_is_shown_where_nothing_was_measured():
    metrics = DistributionMetrics()
    metrics.update(torch.zeros(2, 3), torch.full((3,), -100))
    assert metrics.compute() == {}


def test_many_positions_are_counted_under_bf16_true():
    """Lightning makes all of a module bfloat16, in which 256 and 1 are 256."""
    holder = torch.nn.ModuleList([DistributionMetrics()]).to(torch.bfloat16)
    for _ in range(300):
        holder[0].update(torch.ones(2, 3), torch.zeros(3, dtype=torch.long))
    assert holder[0].compute()["student_entropy"] == 1
    assert holder[0].counts[0] == 900
