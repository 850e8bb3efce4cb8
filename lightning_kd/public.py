"""The public names of the library: ``lightning_kd`` itself has them all.

Everything a configuration file may name is imported here, so that a bare class name is enough:
modules, data modules, divergences, normalizations, students and teachers.
"""

from importlib.metadata import version

from lightning_kd.batch import IGNORE_INDEX, Batch, PairedBatch, PromptBatch, Rollout
from lightning_kd.checkpoints import AtomicCheckpointIO
from lightning_kd.data import (
    ArithmeticData,
    ChatData,
    DistillationData,
    DocumentData,
    PackedTextData,
    PromptCompletionData,
    PromptsAndText,
    arithmetic_tokenizer,
)
from lightning_kd.divergences import (
    Divergence,
    available_divergences,
    make_divergence,
    register_divergence,
)
from lightning_kd.fused import fused_linear_divergence
from lightning_kd.generation import (
    CachedSampler,
    Completions,
    ContinuousBatchingSampler,
    Engine,
    GenerationOptions,
    Prompts,
    SamplingOptions,
    SpeculativeSampler,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.models import DenseLogits, FusedLogits, LoRA, ModelSpec, StudentSpec
from lightning_kd.modules import (
    GKD,
    SFT,
    TAID,
    ULD,
    BabyLlama,
    ChunkLikelihoodKD,
    CorrectedTopK,
    DistillationModule,
    Interpolation,
    MiniLLM,
    OfficialCode,
    OnPolicyDistillation,
    Paper,
    RLDistillation,
    SampledToken,
    SequenceKD,
    SupervisedKD,
    TeacherModule,
    WarmupCosine,
)
from lightning_kd.normalization import (
    BatchMean,
    ConstantLength,
    Normalization,
    SequenceMean,
    TokenMean,
)
from lightning_kd.policy import CISPO, ImportanceSampling, PPOClip
from lightning_kd.preflight import Preflight, check
from lightning_kd.resuming import Resumable
from lightning_kd.schedules import AdaptiveShare, Constant, Cosine, Linear, Steps
from lightning_kd.strategies import DeepSpeedStrategy, FSDP1Strategy, FSDP2Strategy
from lightning_kd.student_evaluation import evaluate
from lightning_kd.teachers import (
    CachedTeacher,
    EMAStudent,
    FrozenStudent,
    LiveStudent,
    LocalTeacher,
    RetokenizingTeacher,
    RoutedTeacher,
    ServedTeacher,
    Teacher,
    TeacherEnsemble,
    TopKTeacher,
)

__version__ = version("lightning-kd")

__all__ = [
    "CISPO",
    "GKD",
    "IGNORE_INDEX",
    "SFT",
    "TAID",
    "ULD",
    "AdaptiveShare",
    "ArithmeticData",
    "AtomicCheckpointIO",
    "BabyLlama",
    "Batch",
    "BatchMean",
    "CachedSampler",
    "CachedTeacher",
    "ChatData",
    "ChunkLikelihoodKD",
    "Completions",
    "Constant",
    "ConstantLength",
    "ContinuousBatchingSampler",
    "CorrectedTopK",
    "Cosine",
    "DeepSpeedStrategy",
    "DenseLogits",
    "DistillationData",
    "DistillationModule",
    "Divergence",
    "DocumentData",
    "EMAStudent",
    "Engine",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "FrozenStudent",
    "FusedLogits",
    "GenerationOptions",
    "ImportanceSampling",
    "Interpolation",
    "Linear",
    "LiveStudent",
    "LoRA",
    "LocalTeacher",
    "MiniLLM",
    "ModelSpec",
    "Normalization",
    "OfficialCode",
    "OnPolicyDistillation",
    "PPOClip",
    "PackedTextData",
    "PairedBatch",
    "Paper",
    "Preflight",
    "PromptBatch",
    "PromptCompletionData",
    "Prompts",
    "PromptsAndText",
    "RLDistillation",
    "Resumable",
    "RetokenizingTeacher",
    "Rollout",
    "RoutedTeacher",
    "SampledToken",
    "SamplingOptions",
    "SequenceKD",
    "SequenceMean",
    "ServedTeacher",
    "SpeculativeSampler",
    "Steps",
    "StudentSpec",
    "SupervisedKD",
    "Teacher",
    "TeacherEnsemble",
    "TeacherModule",
    "TokenMean",
    "TopKTeacher",
    "TransformersContinuousBatching",
    "TransformersEngine",
    "WarmupCosine",
    "arithmetic_tokenizer",
    "available_divergences",
    "check",
    "evaluate",
    "fused_linear_divergence",
    "make_divergence",
    "register_divergence",
]
