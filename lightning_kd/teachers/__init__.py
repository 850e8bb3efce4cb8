"""Teachers: one model, several of them averaged, one for each row, or anything that answers."""

from lightning_kd.teachers.contract import Ability, Teacher, choose_kind
from lightning_kd.teachers.local import LocalModels, LocalTeacher, TeacherEnsemble
from lightning_kd.teachers.routed import RoutedTeacher

TEACHERS: tuple[type[Teacher], ...] = (LocalTeacher, TeacherEnsemble, RoutedTeacher)
"""The teachers of the library."""

__all__ = [
    "TEACHERS",
    "Ability",
    "LocalModels",
    "LocalTeacher",
    "RoutedTeacher",
    "Teacher",
    "TeacherEnsemble",
    "choose_kind",
]
