"""Metrics: of next-token distributions and of generated text."""

from lightning_kd.evaluation.distributions import DistributionMetrics
from lightning_kd.evaluation.overlap import Overlap
from lightning_kd.evaluation.text import ExactMatch

__all__ = ["DistributionMetrics", "ExactMatch", "Overlap"]
