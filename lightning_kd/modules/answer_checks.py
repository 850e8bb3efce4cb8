"""Whether a teacher's answers tell what a method computes from them."""

from collections.abc import Mapping

from lightning_kd.divergences import Divergence
from lightning_kd.fused import AnswerKind, TeacherAnswer, check_estimable
from lightning_kd.teachers import CachedTeacher, Teacher, temperatures_of


def check_temperatures(
    teacher: Teacher, kind: AnswerKind, temperatures: Mapping[str, float]
) -> None:
    """Refuse a temperature at which the teacher's answers are not known.

    Args:
        teacher: The teacher.
        kind: Of its answers in this run.
        temperatures: Of the teacher, by the name of their option.

    Raises:
        ValueError: If there is one.
    """
    known = temperatures_of(teacher, kind)
    if known is None:
        return
    declared = [f"{temperature:g}" for temperature in sorted(known)]
    for name, value in temperatures.items():
        if value not in known:
            raise ValueError(
                f"model.{name} is {value}, but {type(teacher).__name__} answers {kind}, which holds "
                f"at temperature {', '.join(declared)} alone: another one needs the probability of "
                f"every token. Set model.{name}: {' or '.join(declared)}, "
                f"{_way_out(teacher, kind, value)}or take a teacher that answers full_distribution"
            )


def _way_out(teacher: Teacher, kind: AnswerKind, temperature: float) -> str:
    """Return where the tail at a temperature is asked for, if it can be."""
    if kind not in ("top_k", "top_k_and_token"):
        return ""
    if isinstance(teacher, CachedTeacher):
        return f"write the cache with --cache.temperatures '[{temperature:g}]', "
    given = teacher.constructor_arguments()
    # Servers of other kinds tell it at 1 alone.
    if "temperatures" in given and given.get("backend", "lightning_kd") == "lightning_kd":
        return f"have the tail told by model.teacher.temperatures: [{temperature:g}], "
    return ""


def check_divergences(
    teacher: Teacher, kind: AnswerKind, divergences: Mapping[str, Divergence]
) -> None:
    """Refuse a divergence that cannot be estimated from drawn tokens.

    Args:
        teacher: The teacher.
        kind: Of its answers in this run.
        divergences: From the teacher, by the name of their option.

    Raises:
        ValueError: If there is one.
    """
    if kind == "sampled":
        for name, divergence in divergences.items():
            check_estimable(f"model.{name}", divergence, type(teacher).__name__)


def check_width(teacher: Teacher, answer: TeacherAnswer, width: int) -> None:
    """Refuse logits of more tokens than are compared.

    Args:
        teacher: The teacher.
        answer: Its answer.
        width: Tokens that student and teacher share.

    Raises:
        ValueError: If there are more.
    """
    widest = max((source.shape[1] for source in answer.sources), default=0)
    if widest > width:
        raise ValueError(
            f"the vocabulary_size of {type(teacher).__name__} is {width}, and it has answered with "
            f"logits of {widest} tokens; return as many"
        )
