"""What a teacher must be able to do beside answering."""

from collections.abc import Mapping, Sequence

from lightning_kd.teachers.contract import Ability, Teacher

_WRITTEN_FOR: Mapping[Ability, str] = {"generation": "generate", "mixture": "model_on"}
"""The method that a teacher writes for an ability."""


def check_ability(
    teacher: object, ability: Ability, user: str, others: Sequence[type[Teacher]] = ()
) -> Teacher:
    """Return a teacher that has an ability.

    Args:
        teacher: A teacher, or None.
        ability: ``generation`` or ``mixture``.
        user: What needs it, for the message.
        others: Classes of teachers; the message names those that have it.

    Raises:
        ValueError: If it has not, or lists it without the method for it.
    """
    if isinstance(teacher, Teacher) and ability in teacher.answers:
        method = _WRITTEN_FOR[ability]
        if getattr(type(teacher), method) is getattr(Teacher, method):
            raise ValueError(
                f"{type(teacher).__name__} lists {ability!r} in answers and has no {method}; write it, "
                "or list what the teacher can do"
            )
        teacher.check_generation()
        return teacher
    came = "none" if teacher is None else type(teacher).__name__
    able = " or ".join(other.__name__ for other in others if ability in other.answers)
    raise ValueError(
        f"{user} needs a teacher that lists {ability!r} in answers, got {came}; give one that does, "
        f"such as {able}"
    )
