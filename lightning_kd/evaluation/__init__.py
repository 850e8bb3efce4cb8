"""Metrics: of next-token distributions and of generated text."""

from lightning_kd.evaluation.completion_metric import (
    CompletionMetric,
    CompletionScore,
    MeanScore,
    check_references,
    computed,
    metric_name,
)
from lightning_kd.evaluation.distributions import DistributionMetrics
from lightning_kd.evaluation.exposure_bias import ExcessError
from lightning_kd.evaluation.given_metrics import as_metric
from lightning_kd.evaluation.gsm8k import GSM8KAccuracy
from lightning_kd.evaluation.ngrams import (
    DistinctN,
    Repetition,
    distinct_ngrams,
    repeated_ngrams,
)
from lightning_kd.evaluation.overlap import Overlap
from lightning_kd.evaluation.speculative import speed_up, tokens_per_call
from lightning_kd.evaluation.text import ExactMatch, RougeL

__all__ = [
    "CompletionMetric",
    "CompletionScore",
    "DistinctN",
    "DistributionMetrics",
    "ExactMatch",
    "ExcessError",
    "GSM8KAccuracy",
    "MeanScore",
    "Overlap",
    "Repetition",
    "RougeL",
    "as_metric",
    "check_references",
    "computed",
    "distinct_ngrams",
    "metric_name",
    "repeated_ngrams",
    "speed_up",
    "tokens_per_call",
]
