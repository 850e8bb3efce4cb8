"""Where student and teacher come from."""

from lightning_kd.models import StudentSpec
from lightning_kd.teachers import Teacher


def check_origin(student: StudentSpec, teacher: Teacher, *, alike: bool) -> None:
    """Refuse a teacher that is the student, from which there is nothing to learn.

    Args:
        student: The student's model.
        teacher: The teacher.
        alike: Whether the method learns anything from a teacher that is the student as it starts.

    Raises:
        ValueError: If it is the same model object, or comes from where the student does.
    """
    teachers = teacher.model_specs
    if any(student.is_same_object(each) for each in teachers):
        raise ValueError("student and teacher are one model object, which cannot also be frozen")
    if alike or len(teachers) > 1:
        return
    if any(student.is_same_checkpoint(each) for each in teachers):
        raise ValueError(
            f"student and teacher are both {student.name_or_path!r}: the student starts as its "
            "teacher, and nothing pulls it anywhere else. Give another teacher, or a copy of the "
            "directory if that is what you want"
        )
