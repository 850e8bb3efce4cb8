"""Numbers at scored positions, from logits that are never all there at once."""

from lightning_kd.fused.aligned_answers import (
    AlignedAnswer,
    ChunkLogProbs,
    ChunkStartDistributions,
    chunk_log_ratio,
)
from lightning_kd.fused.answers import (
    ALIGNED_KINDS,
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
from lightning_kd.fused.sorted_distance import SortedDistance
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
from lightning_kd.fused.token_log_probs import token_log_probs_of
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
    "ALIGNED_KINDS",
    "CHUNK_BYTES",
    "AlignedAnswer",
    "AnswerKind",
    "ChunkLogProbs",
    "ChunkStartDistributions",
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
    "SortedDistance",
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
    "chunk_log_ratio",
    "evaluate_no_grad",
    "fused_linear_divergence",
    "per_token",
    "picked",
    "sampled_of",
    "single_model_log_probs",
    "tail_draws_of",
    "token_log_probs_of",
    "top_k_of",
    "total_of",
    "weighted_sum",
]
