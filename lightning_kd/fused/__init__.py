"""Numbers at scored positions, from logits that are never all there at once."""

from lightning_kd.fused.autograd import evaluate_no_grad, per_token, weighted_sum
from lightning_kd.fused.chunked_pass import CHUNK_BYTES, ChunkedPass
from lightning_kd.fused.functional import FusedDivergence, fused_linear_divergence
from lightning_kd.fused.lazy_logits import (
    LazyHeadLogits,
    LazyLogits,
    MaterializedLogits,
    RoutedLogits,
    TeacherLogits,
    single_model_log_probs,
)
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm
from lightning_kd.fused.token_terms import (
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    StudentMassBeyond,
    TeacherCrossEntropy,
    TeacherEntropy,
    TeacherMassBeyond,
    TeacherTokenLogProb,
    TokenLoss,
    Top1Agreement,
    WeightedSum,
    ZeroTerm,
)

__all__ = [
    "CHUNK_BYTES",
    "ChunkedPass",
    "CrossEntropy",
    "DivergenceTerm",
    "Entropy",
    "FusedDivergence",
    "LazyHeadLogits",
    "LazyLogits",
    "LogitsChunk",
    "MaterializedLogits",
    "RoutedLogits",
    "StudentMassBeyond",
    "TeacherCrossEntropy",
    "TeacherEntropy",
    "TeacherLogits",
    "TeacherMassBeyond",
    "TeacherTokenLogProb",
    "TokenLoss",
    "TokenTerm",
    "Top1Agreement",
    "WeightedSum",
    "ZeroTerm",
    "evaluate_no_grad",
    "fused_linear_divergence",
    "per_token",
    "single_model_log_probs",
    "weighted_sum",
]
