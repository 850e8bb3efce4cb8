"""Evaluation of a student that is on disk, without the run that trained it."""

import json
from pathlib import Path

import lightning as L
from jsonargparse.typing import lazy_instance
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import CompletionSamples, ProgressBar
from lightning_kd.callbacks.output_paths import check_output
from lightning_kd.data import DistillationData
from lightning_kd.filesystem import write_text
from lightning_kd.modules import SFT, SupervisedKD
from lightning_kd.modules.evaluated_checkpoint import warn_of_another_tokenizer
from lightning_kd.processes import wait_for
from lightning_kd.resuming import tokenizer_digest
from lightning_kd.tokenization import check_path, load_tokenizer

_DEFAULT = lazy_instance(CompletionSamples)
"""Exact match, greedily; help shows what it is made of."""


def evaluate(
    student: str,
    data: DistillationData,
    completions: CompletionSamples | None = _DEFAULT,
    teacher: str | None = None,
    callbacks: list[Callback] | None = None,
    output: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    precision: str | None = None,
    seed_everything: int = 0,
) -> dict[str, float]:
    """Evaluate a student that was exported, or any causal language model, on test data.

    Prints a table of all that ``lightning-kd test`` logs: cross-entropy and perplexity, metrics of
    completions, and those of further callbacks; beside a teacher also both KL divergences.

    Args:
        student: Directory or hub name of the model, with its tokenizer.
        data: The test rows. A class of data module is chosen by its name; by itself it is
            PromptCompletionData with the student's tokenizer, so that ``--data.test FILE`` is enough.
        completions: How prompts are completed, and by what completions are measured; null completes
            none.
        teacher: Directory or hub name of a model that the student is compared with.
        callbacks: Further callbacks that log to ``test/``.
        output: File to write the numbers to, as JSON.
        accelerator: As of Lightning's trainer.
        devices: As of Lightning's trainer; several share the rows.
        precision: As of Lightning's trainer, such as ``bf16-mixed``.
        seed_everything: Seed of completions that are sampled.

    Returns:
        The numbers, by the names that they are logged under.

    Raises:
        ValueError: If there is no such model, no test data, something cannot be computed, or
            ``output`` is a file with something else than earlier numbers of the same models.

    Example:
        >>> from lightning_kd import ArithmeticData
        >>> evaluate("runs/student", ArithmeticData(), completions=None)  # doctest: +SKIP
        {'test/loss': 0.02, ...}
    """
    place = None if output is None else Path(output)
    if place is not None and (place.is_dir() or not place.resolve().parent.is_dir()):
        raise ValueError(f"output is {output!r}; give a file in a directory that exists")
    measured = CompletionSamples() if completions is _DEFAULT else completions
    if not isinstance(measured, CompletionSamples | None):
        raise ValueError(
            f"completions is a {type(measured).__name__}; give CompletionSamples(metrics=[...]), or "
            "None"
        )
    _check_student(student)
    L.seed_everything(seed_everything, verbose=False)
    asked = [*(callbacks or []), *([] if measured is None else [measured])]
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,  # type: ignore[arg-type]  # a name among Lightning's, or refused there
        callbacks=[*asked, ProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = (
        SFT(student=student)
        if teacher is None
        else SupervisedKD(student=student, teacher=teacher, alpha=1.0)  # the loss stays the data's
    )
    _warn_of_another_tokenizer(student, data)
    if place is not None:
        check_output(data, place, "output")
        _check_results(place, student, teacher)
    (numbers,) = trainer.test(module, datamodule=data)
    wait_for(trainer.strategy.launcher)
    if place is not None and trainer.is_global_zero:
        said = {"student": student, "teacher": teacher, "metrics": dict(numbers)}
        write_text(place, json.dumps(said, indent=2) + "\n")
    return dict(numbers)


def _check_student(student: str) -> None:
    """Refuse a directory without a model, which a run's own is."""
    check_path(student, "student")
    place = Path(student).expanduser()
    exported = place / "student"
    if not (place / "config.json").is_file() and (exported / "config.json").is_file():
        raise ValueError(f"student is {student!r}, a run; did you mean {exported}?")


def _check_results(place: Path, student: str, teacher: str | None) -> None:
    """Refuse to overwrite what is not an earlier result of the same models."""
    if not place.exists():
        return
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        said = None
    found = said if isinstance(said, dict) and "metrics" in said else {}
    if (found.get("student"), found.get("teacher")) != (student, teacher):
        of = f"the numbers of {found['student']}" if "student" in found else "something else"
        raise ValueError(
            f"output is {str(place)!r}, which has {of}; remove it, or give another file"
        )


def _warn_of_another_tokenizer(student: str, data: DistillationData) -> None:
    try:
        beside = tokenizer_digest(load_tokenizer(student))
    except ValueError:  # a model alone
        return
    warn_of_another_tokenizer(data.tokenizer, beside, "that beside the student")
