"""Language-model distillation in PyTorch Lightning.

Everything a configuration file may name is imported here, so that a bare class name is enough:
modules, data modules, divergences, normalizations, students and teachers.
"""

from importlib.metadata import version

from lightning_kd.data import (
    ArithmeticData,
    ChatData,
    DistillationData,
    PackedTextData,
    PromptCompletionData,
    arithmetic_tokenizer,
)
from lightning_kd.divergences import (
    Divergence,
    available_divergences,
    make_divergence,
    register_divergence,
)
from lightning_kd.generation import GenerationOptions
from lightning_kd.models import LoRA, ModelSource, SingleTeacher, Student, Teacher, TeacherEnsemble
from lightning_kd.modules import (
    SFT,
    BabyLlama,
    DistillationModule,
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
from lightning_kd.types import IGNORE_INDEX, Batch

__version__ = version("lightning-kd")

__all__ = [
    "IGNORE_INDEX",
    "SFT",
    "ArithmeticData",
    "BabyLlama",
    "Batch",
    "BatchMean",
    "ChatData",
    "ConstantLength",
    "DistillationData",
    "DistillationModule",
    "Divergence",
    "GenerationOptions",
    "LoRA",
    "ModelSource",
    "Normalization",
    "PackedTextData",
    "PromptCompletionData",
    "SequenceKD",
    "SequenceMean",
    "SingleTeacher",
    "Student",
    "SupervisedKD",
    "Teacher",
    "TeacherEnsemble",
    "TeacherModule",
    "TokenMean",
    "WarmupCosine",
    "arithmetic_tokenizer",
    "available_divergences",
    "make_divergence",
    "register_divergence",
]
