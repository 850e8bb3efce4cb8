"""Numbers at scored positions, from logits that are never all there at once."""

from lightning_kd.fused.answers import (
    AnswerKind,
    FullDistribution,
    TeacherAnswer,
    TokenLogProbs,
    are_log_probs,
)
from lightning_kd.fused.autograd import evaluate_no_grad, per_token, total_of, weighted_sum
from lightning_kd.fused.chunked_pass import CHUNK_BYTES, ChunkedPass
from lightning_kd.fused.draws import sampled_of, tail_draws_of
from lightning_kd.fused.functional import FusedDivergence, fused_linear_divergence
from lightning_kd.fused.lazy_logits import (
    LazyHeadLogits,
    LazyLogits,
    MaterializedLogits,
    PaddedLogits,
    RoutedLogits,
)
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm
from lightning_kd.fused.overlap_terms import (
    StudentOverlapMass,
    TeacherOverlapMass,
    TopKOverlap,
)
from lightning_kd.fused.picked import picked
from lightning_kd.fused.sparse_answers import SampledTokens, TopK, TopKAndToken
from lightning_kd.fused.sparse_rows import SampledRows, TopKRows, check_estimable
from lightning_kd.fused.student_rows import StudentRows
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.fused.tail_terms import SquaredScore, TailLoss
from lightning_kd.fused.teacher_rows import (
    DistributionRows,
    TeacherRows,
    single_model_log_probs,
)
from lightning_kd.fused.token_terms import (
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    LogNormalizer,
    LogRatio,
    TeacherCrossEntropy,
    TeacherEntropy,
    TeacherLogNormalizer,
    TeacherTokenLogProb,
    TokenLoss,
    Top1Agreement,
    WeightedSum,
    ZeroTerm,
)

__all__ = [
    "CHUNK_BYTES",
    "AnswerKind",
    "ChunkedPass",
    "CrossEntropy",
    "DistributionRows",
    "DivergenceTerm",
    "Entropy",
    "FullDistribution",
    "FusedDivergence",
    "LazyHeadLogits",
    "LazyLogits",
    "LogNormalizer",
    "LogRatio",
    "LogitsChunk",
    "MaterializedLogits",
    "PaddedLogits",
    "RoutedLogits",
    "SampledRows",
    "SampledTokens",
    "SquaredScore",
    "StudentOverlapMass",
    "StudentRows",
    "TailLoss",
    "TeacherAnswer",
    "TeacherCrossEntropy",
    "TeacherEntropy",
    "TeacherLogNormalizer",
    "TeacherOverlapMass",
    "TeacherRows",
    "TeacherTokenLogProb",
    "TokenLogProbs",
    "TokenLoss",
    "TokenTerm",
    "Top1Agreement",
    "TopK",
    "TopKAndToken",
    "TopKOverlap",
    "TopKRows",
    "WeightedSum",
    "ZeroTerm",
    "are_log_probs",
    "check_estimable",
    "evaluate_no_grad",
    "fused_linear_divergence",
    "per_token",
    "picked",
    "sampled_of",
    "single_model_log_probs",
    "tail_draws_of",
    "top_k_of",
    "total_of",
    "weighted_sum",
]
