"""The command ``lightning-kd demo``."""

from pathlib import Path

from lightning_kd.cli.compare import run_comparison
from lightning_kd.cli.named_configs import NAMED_CONFIGS
from lightning_kd.comparison.reading import read_experiment

EXPERIMENT = NAMED_CONFIGS["experiments/demo"]


def demo(
    output: str = "runs/demo",
    seed: int = 0,
    teacher_steps: int = 700,
    student_steps: int = 500,
    train_size: int = 1000,
    label_noise: float = 0.3,
    rerun_changed: bool = False,
) -> None:
    """Train two teachers on sums of three-digit numbers and distil them into small students.

    The teachers see as many problems as they like. The students, all alike and from the same start,
    see only a few, a share of them with a wrong answer, as in human-written data: with nothing
    else to go by, they learn the mistakes too; a teacher tells them better. Two learn on what they
    write themselves; one of them, MiniLLM, goes on from what SFT has learned, for half as many steps.
    Ends with a table (exact match on held-out problems, KL to the teacher, wall time), a picture of the
    curves and TensorBoard logs. Typed again, it makes what is not there yet.

    Args:
        output: Where logs, models and the picture go.
        seed: Of weights, data order and everything else.
        teacher_steps: Optimizer steps of each teacher.
        student_steps: Optimizer steps of each student.
        train_size: Problems that the students learn from.
        label_noise: Share of these problems with a wrong answer.
        rerun_changed: Make runs anew that are there with other options.
    """
    given = {"train_size": train_size, "label_noise": label_noise}
    steps = {"teacher": teacher_steps, "student": student_steps, "minillm": student_steps // 2}
    for name, number in steps.items():
        given |= {f"{name}_steps": number, f"{name}_checks": max(1, number // 8)}
    options = {"output": output, "seed": seed, "teacher_steps": teacher_steps}
    options |= {"student_steps": student_steps, "train_size": train_size}
    options |= {"label_noise": label_noise}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run_comparison(
        read_experiment(EXPERIMENT),
        [seed],
        Path(output),
        given=[f"{name}={value}" for name, value in given.items()],
        rerun_changed=rerun_changed,
        command=["lightning-kd", "demo", *words],
    )
