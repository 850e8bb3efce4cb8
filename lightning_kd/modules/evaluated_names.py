"""Names of what a module logs of an evaluation."""

from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.teacher_module import TeacherModule


def loss_terms(module: DistillationModule) -> set[str]:
    """Return the terms of a method's own loss that its evaluation logs."""
    return {*(module.evaluation_terms or module.terms)}


def evaluated_names(module: DistillationModule) -> set[str]:
    """Return all names that may be logged, without ``val/``; a teacher's answer decides which are."""
    metrics = module.eval_distribution
    # The cross-entropy is there as perplexity, and under its own name where it is a term.
    of_student = {*metrics.student_names} - {"cross_entropy"}
    own = {"loss", "tokens", "perplexity", "bits_per_byte", *loss_terms(module), *of_student}
    if isinstance(module, TeacherModule):
        of_teacher = {*metrics.names} - {*metrics.student_names}
        own |= {"entropy_gap", *of_teacher, *metrics.dropped_names}
    return own
