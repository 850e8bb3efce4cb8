"""Metrics of completions; those of distributions are in the tests of the evaluation and the steps."""

from lightning_kd.metrics import ExactMatch


def test_one_completion_is_all_or_nothing():
    metric = ExactMatch()
    metric.update([" 12"], ["12 "])
    assert metric.compute() == 1
