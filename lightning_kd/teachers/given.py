"""Teachers as users hand them over: by name, by configuration, as models, or several in a list."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_kd.models.given import kind_of, spec_of
from lightning_kd.teachers.contract import Teacher
from lightning_kd.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from lightning_kd.models.given import ModelLike

    TeacherLike = Teacher | ModelLike
    TeachersLike = Teacher | ModelLike | Sequence[Teacher | ModelLike]
else:
    # What a command line and its help offer: all that can be written there.
    TeacherLike = LocalTeacher | Teacher
    TeachersLike = TeacherLike


def as_teacher(given: object, role: str = "teacher") -> Teacher:
    """Return the teacher of a model that is given by name, by configuration or as an object.

    Args:
        given: One of these, or a teacher.
        role: What it is given for, for messages.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> as_teacher("./teacher").name_or_path
        './teacher'
    """
    if isinstance(given, Teacher):
        return given
    spec = spec_of(given, LocalTeacher, role)
    if spec is None:
        raise ValueError(
            f"{role} is a {kind_of(given)}; give the name or directory of a model, its configuration "
            "(with model_type), a model of transformers or peft, or a Teacher such as "
            "LocalTeacher(...) or TeacherEnsemble([...])"
        )
    return spec
