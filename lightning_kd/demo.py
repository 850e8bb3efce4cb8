"""The offline demonstration: teachers, five students, a table and a picture."""

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.callbacks import (
    CompletionSamples,
    HFExport,
    OnPolicyGeneration,
    TensorBoardLayout,
    TokensPerSecond,
)
from lightning_kd.data import ArithmeticData
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import (
    GKD,
    SFT,
    BabyLlama,
    DistillationModule,
    MiniLLM,
    SupervisedKD,
    WarmupCosine,
)
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble

TEACHER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
STUDENT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
AFTER_SFT = "MiniLLM"
"""Goes on from the student of SFT, as in its paper, for half as many steps."""


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    name: str
    metrics: dict[str, float]
    started: float
    """Wall clock at the start of training, in seconds."""
    seconds: float


def demo(
    output: str = "runs/demo",
    seed: int = 0,
    teacher_steps: int = 700,
    student_steps: int = 500,
    train_size: int = 1000,
    label_noise: float = 0.3,
) -> list[Result]:
    """Train two teachers on sums of three-digit numbers and distil them into small students.

    The teachers see as many problems as they like. The students, all alike and from the same start,
    see only a few, a share of them with a wrong answer, as in human-written data: with nothing
    else to go by, they learn the mistakes too; a teacher tells them better. Two learn on what they
    write themselves; one of them, MiniLLM, goes on from what SFT has learned. Ends with a table
    (exact match on held-out problems, KL to the teacher, wall time), a picture of the
    curves and TensorBoard logs.

    Args:
        output: Where logs, models and the picture go.
        seed: Of weights, data order and everything else.
        teacher_steps: Optimizer steps of each teacher.
        student_steps: Optimizer steps of each student.
        train_size: Problems that the students learn from.
        label_noise: Share of these problems with a wrong answer.
    """
    root, console = Path(output), Console()
    # A dozen short runs: what Lightning and transformers say at the start of each is no news.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    results = []
    for name in ("teacher_a", "teacher_b"):
        # Each its own seed: an ensemble of equals would be a single teacher.
        L.seed_everything(2 * seed + (name == "teacher_b"), verbose=False)
        learner = SFT(student=_llama(TEACHER), **_optimization(2e-3))
        data = ArithmeticData(batch_size=128, train_size=200_000, eval_batch_size=250)
        results.append(_run(name, learner, data, teacher_steps, root, console))
    teachers = [str(root / result.name / "student") for result in results]
    for name, module in _students(root, teachers).items():
        L.seed_everything(seed, verbose=False)
        data = ArithmeticData(
            batch_size=128, train_size=train_size, label_noise=label_noise, eval_batch_size=250
        )
        steps = student_steps // 2 if name == AFTER_SFT else student_steps
        results.append(_run(name, module, data, steps, root, console, _writing(name)))
    results = [_test(result, teachers[0], root) for result in results]
    _print_table(results, console)
    picture = _draw(results, root)
    console.print(f"The curves are in {picture}; tensorboard --logdir {root} shows more")
    return results


def _students(root: Path, teachers: Sequence[str]) -> dict[str, DistillationModule]:
    """Make the students, from one random start but for the one that continues from ``SFT``."""
    first, ensemble = LocalTeacher(teachers[0]), TeacherEnsemble([*map(LocalTeacher, teachers)])
    from_scratch: dict[str, Any] = {"student": _llama(STUDENT), **_optimization(2e-3)}
    return {
        "SFT": SFT(**from_scratch),
        "SupervisedKD": SupervisedKD(teacher=first, alpha=0.0, **from_scratch),
        "BabyLlama": BabyLlama(teacher=ensemble, **from_scratch),
        "GKD": GKD(teacher=first, divergence="forward_kl", **from_scratch),
        AFTER_SFT: MiniLLM(
            student=StudentSpec(str(root / "SFT" / "student")),
            teacher=first,
            **_optimization(5e-4, 20),
        ),
    }


def _writing(name: str) -> list[Callback]:
    """Which model generates for a student; the data set where none is named."""
    generation = SamplingOptions(max_new_tokens=6)
    if name == "GKD":
        return [OnPolicyGeneration(generation=generation)]
    if name == AFTER_SFT:
        return [OnPolicyGeneration(generation=generation, mixture_alpha=0.2)]
    return []


def _optimization(lr: float, warmup_steps: int = 100) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup_steps=warmup_steps),
    }


def _llama(config: dict[str, int]) -> StudentSpec:
    return StudentSpec(config={"model_type": "llama", "num_attention_heads": 4, **config})


def _run(
    name: str,
    module: DistillationModule,
    data: ArithmeticData,
    steps: int,
    root: Path,
    console: Console,
    more: Sequence[Callback] = (),
) -> Result:
    """Train one model and export it; the clock counts training and its validation."""
    console.rule(name)
    logger = TensorBoardLogger(root, name=name, version="", default_hp_metric=False)
    trainer = _trainer(
        logger=logger,
        max_steps=steps,
        val_check_interval=max(1, steps // 8),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, steps),
        callbacks=[
            CompletionSamples(max_new_tokens=6, batches=1),
            HFExport(str(root / name / "student"), overwrite=True),
            TensorBoardLayout(),
            TokensPerSecond(),
            TQDMProgressBar(refresh_rate=20),
            *more,
        ],
    )
    started = time.time()
    try:
        trainer.fit(module, datamodule=data)
    except SIGTERMException as error:  # whose own code is that of success
        raise SystemExit(128 + signal.SIGTERM) from error
    return Result(name, {}, started, time.time() - started)


def _test(result: Result, teacher: str, root: Path) -> Result:
    """Measure an exported model on the test problems, against the first teacher."""
    module = SupervisedKD(
        student=StudentSpec(str(root / result.name / "student")), teacher=LocalTeacher(teacher)
    )
    trainer = _trainer(
        logger=False, callbacks=[CompletionSamples(max_new_tokens=6)], enable_progress_bar=False
    )
    (metrics,) = trainer.test(module, datamodule=ArithmeticData(batch_size=500), verbose=False)
    return replace(result, metrics=dict(metrics))


def _trainer(**settings: Any) -> L.Trainer:
    return L.Trainer(devices=1, enable_checkpointing=False, enable_model_summary=False, **settings)


def _print_table(results: list[Result], console: Console) -> None:
    table = Table("", "exact match", "KL to teacher_a", "reverse KL", "wall time")
    for result in results:
        table.add_row(
            result.name,
            f"{result.metrics['test/exact_match']:.1%}",
            f"{result.metrics['test/forward_kl']:.4f}",
            f"{result.metrics['test/reverse_kl']:.4f}",
            f"{result.seconds:.0f} s",
        )
    console.print(table)


def _draw(results: list[Result], root: Path) -> Path:
    """Exact match on the validation problems, over steps and over time, and cross-entropy."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib: pip install 'lightning-kd[plot]'"
        ) from error
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, tag, title in (
        (axes[0], "val/exact_match", "exact match on unseen problems"),
        (axes[1], "val/exact_match", "the same, over time"),
        (axes[2], "val/reverse_kl", "reverse KL to the teacher (nats per token)"),
    ):
        over_time = axis is axes[1]
        for result in results:
            events = EventAccumulator(str(root / result.name), size_guidance={"scalars": 0})
            events.Reload()
            if tag not in events.Tags()["scalars"]:
                continue  # a run without a teacher has no KL
            points = [
                (event.wall_time - result.started if over_time else event.step + 1, event.value)
                for event in events.Scalars(tag)
            ]
            style = "--" if result.name.startswith("teacher") else "-"
            color = f"C{results.index(result)}"
            axis.plot(*zip(*points, strict=True), style, marker=".", label=result.name, color=color)
        axis.set(title=title, xlabel="seconds of training" if over_time else "optimizer step")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[0].legend()
    path = root / "curves.png"
    figure.savefig(path, dpi=120)
    return path
