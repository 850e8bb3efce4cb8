"""Metrics of completions, and of distributions that are in no evaluation and no step."""

import math

import pytest
import torch

from lightning_kd.evaluation import DistributionMetrics, ExactMatch


def test_a_student_alone_is_compared_with_nobody():
    metrics, targets = DistributionMetrics(), torch.tensor([4, -100, 2])
    values = torch.tensor([[1.0, 99.0, 3.0], [0.5, 99.0, 0.7]])  # nats of its text, and its entropy
    metrics.update(values, targets)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx({"perplexity": math.exp(2), "student_entropy": 0.6})


def test_one_completion_is_all_or_nothing():
    metric = ExactMatch()
    metric.update([" 12"], ["12 "])
    assert metric.compute() == 1
