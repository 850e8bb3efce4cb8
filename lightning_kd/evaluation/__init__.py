"""Numbers at scored positions, from logits that are never all there at once."""

from lightning_kd.evaluation.chunks import CHUNK_BYTES, Sweep
from lightning_kd.evaluation.functional import FusedDivergence, fused_linear_divergence
from lightning_kd.evaluation.fused import per_token, weighted_sum
from lightning_kd.evaluation.quantities import (
    Agreement,
    Block,
    CrossEntropy,
    Entropy,
    Matching,
    Quantity,
    TeacherCrossEntropy,
    TeacherEntropy,
    TeacherMassBeyond,
    TeacherToken,
    TokenLoss,
    Weighed,
)
from lightning_kd.evaluation.sources import (
    GivenLogits,
    LogitSource,
    Projection,
    RoutedLogits,
    TeacherLogits,
)

__all__ = [
    "CHUNK_BYTES",
    "Agreement",
    "Block",
    "CrossEntropy",
    "Entropy",
    "FusedDivergence",
    "GivenLogits",
    "LogitSource",
    "Matching",
    "Projection",
    "Quantity",
    "RoutedLogits",
    "Sweep",
    "TeacherCrossEntropy",
    "TeacherEntropy",
    "TeacherLogits",
    "TeacherMassBeyond",
    "TeacherToken",
    "TokenLoss",
    "Weighed",
    "fused_linear_divergence",
    "per_token",
    "weighted_sum",
]
