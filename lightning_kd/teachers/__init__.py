"""Teachers: one model, several of them averaged, or one for each row."""

from lightning_kd.teachers.local import LocalTeacher, Teacher, TeacherEnsemble
from lightning_kd.teachers.routed import RoutedTeacher

__all__ = ["LocalTeacher", "RoutedTeacher", "Teacher", "TeacherEnsemble"]
