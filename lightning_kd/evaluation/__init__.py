"""Numbers at scored positions, from logits that are never all there at once."""

from lightning_kd.evaluation.block import Block, Quantity
from lightning_kd.evaluation.chunks import CHUNK_BYTES, Sweep
from lightning_kd.evaluation.functional import FusedDivergence, fused_linear_divergence
from lightning_kd.evaluation.fused import look, per_token, weighted_sum
from lightning_kd.evaluation.quantities import (
    Agreement,
    Combination,
    CrossEntropy,
    Entropy,
    Matching,
    Nothing,
    StudentMassBeyond,
    TeacherCrossEntropy,
    TeacherEntropy,
    TeacherMassBeyond,
    TeacherToken,
    TokenLoss,
)
from lightning_kd.evaluation.sources import (
    GivenLogits,
    LogitSource,
    Projection,
    RoutedLogits,
    TeacherLogits,
    of_one_model,
)

__all__ = [
    "CHUNK_BYTES",
    "Agreement",
    "Block",
    "Combination",
    "CrossEntropy",
    "Entropy",
    "FusedDivergence",
    "GivenLogits",
    "LogitSource",
    "Matching",
    "Nothing",
    "Projection",
    "Quantity",
    "RoutedLogits",
    "StudentMassBeyond",
    "Sweep",
    "TeacherCrossEntropy",
    "TeacherEntropy",
    "TeacherLogits",
    "TeacherMassBeyond",
    "TeacherToken",
    "TokenLoss",
    "fused_linear_divergence",
    "look",
    "of_one_model",
    "per_token",
    "weighted_sum",
]
