"""Students and teachers: where their weights come from, and how a teacher speaks."""

from lightning_kd.models.logits import DenseLogits, FusedLogits, Logits
from lightning_kd.models.routed import RoutedTeacher
from lightning_kd.models.source import ModelSource
from lightning_kd.models.student import LoRA, Student
from lightning_kd.models.teachers import SingleTeacher, Teacher, TeacherEnsemble
from lightning_kd.models.vocabulary import (
    VocabularyPolicy,
    load_tokenizer,
    shared_vocabulary,
    vocabulary_size,
)

__all__ = [
    "DenseLogits",
    "FusedLogits",
    "LoRA",
    "Logits",
    "ModelSource",
    "RoutedTeacher",
    "SingleTeacher",
    "Student",
    "Teacher",
    "TeacherEnsemble",
    "VocabularyPolicy",
    "load_tokenizer",
    "shared_vocabulary",
    "vocabulary_size",
]
