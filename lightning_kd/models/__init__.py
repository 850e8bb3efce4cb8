"""Models: specs of where weights come from, output heads, vocabularies, placement, sharding."""

from lightning_kd.models.given import StudentLike
from lightning_kd.models.logits_backend import DenseLogits, FusedLogits, LogitsBackend
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.student_spec import LoRA, StudentSpec
from lightning_kd.models.vocabulary import (
    VocabularyPolicy,
    shared_vocabulary,
    vocabulary_size,
)

__all__ = [
    "DenseLogits",
    "FusedLogits",
    "LoRA",
    "LogitsBackend",
    "ModelSpec",
    "StudentLike",
    "StudentSpec",
    "VocabularyPolicy",
    "shared_vocabulary",
    "vocabulary_size",
]
