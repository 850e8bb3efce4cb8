"""Teachers: one model, several teachers averaged, one for each row, or anything that answers."""

from lightning_kd.teachers.contract import (
    Ability,
    Teacher,
    check_ability,
    checked_answer,
    choose_kind,
    temperatures_of,
)
from lightning_kd.teachers.ensemble import TeacherEnsemble
from lightning_kd.teachers.local import LocalTeacher
from lightning_kd.teachers.routed import RoutedTeacher

TEACHERS: tuple[type[Teacher], ...] = (LocalTeacher, TeacherEnsemble, RoutedTeacher)
"""The teachers of the library."""

__all__ = [
    "TEACHERS",
    "Ability",
    "LocalTeacher",
    "RoutedTeacher",
    "Teacher",
    "TeacherEnsemble",
    "check_ability",
    "checked_answer",
    "choose_kind",
    "temperatures_of",
]
