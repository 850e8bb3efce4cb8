"""Teachers: a model, several, one for each row, on disk, with other tokens, the student itself."""

from lightning_kd.teachers.abilities import check_ability
from lightning_kd.teachers.cached import CachedTeacher
from lightning_kd.teachers.composite import with_members
from lightning_kd.teachers.contract import (
    Ability,
    Teacher,
    TeacherUnavailableError,
    checked_answer,
    choose_kind,
)
from lightning_kd.teachers.ensemble import TeacherEnsemble
from lightning_kd.teachers.given import TeachersLike
from lightning_kd.teachers.itself import LiveStudent, SelfTeacher, self_teachers
from lightning_kd.teachers.local import LocalTeacher
from lightning_kd.teachers.retokenizing import RetokenizingTeacher
from lightning_kd.teachers.routed import RoutedTeacher
from lightning_kd.teachers.served import ServedTeacher
from lightning_kd.teachers.student_copies import CopyOfStudent, EMAStudent, FrozenStudent
from lightning_kd.teachers.temperatures import temperatures_of
from lightning_kd.teachers.text_coverage import UnreadableRowError
from lightning_kd.teachers.top_k import TopKTeacher

TEACHERS: tuple[type[Teacher], ...] = (
    LocalTeacher,
    TeacherEnsemble,
    RoutedTeacher,
    TopKTeacher,
    ServedTeacher,
    CachedTeacher,
    LiveStudent,
    FrozenStudent,
    EMAStudent,
    RetokenizingTeacher,
)
"""The teachers of the library."""

__all__ = [
    "TEACHERS",
    "Ability",
    "CachedTeacher",
    "CopyOfStudent",
    "EMAStudent",
    "FrozenStudent",
    "LiveStudent",
    "LocalTeacher",
    "RetokenizingTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "ServedTeacher",
    "Teacher",
    "TeacherEnsemble",
    "TeacherUnavailableError",
    "TeachersLike",
    "TopKTeacher",
    "UnreadableRowError",
    "check_ability",
    "checked_answer",
    "choose_kind",
    "self_teachers",
    "temperatures_of",
    "with_members",
]
