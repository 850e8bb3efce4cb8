"""The directory of an exported student: what may be replaced, and how it is written."""

import shutil
from pathlib import Path
from typing import Any

from lightning_kd.callbacks.export.card import CardContext, model_card
from lightning_kd.callbacks.export.options import CARD
from lightning_kd.callbacks.export.student import write_student
from lightning_kd.checkpoints import fresh_name
from lightning_kd.filesystem import check_writable, flush, replace_directory
from lightning_kd.modules import DistillationModule

RUN = ".run"
"""File in the exported directory that holds the id of the run."""


def check_place(module: DistillationModule, directory: Path) -> None:
    """Refuse a directory that the run reads, or that cannot be written.

    Raises:
        ValueError: If it is one.
    """
    for role, path in _inputs(module):
        if Path(path).exists() and Path(path).resolve() == directory:
            raise ValueError(
                f"export.dirpath is {directory}, which is the {role} of this run; a run never "
                "replaces what it reads. Choose another directory"
            )
    try:
        fresh_name(directory).exists()
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError("there is a file of that name")
        check_writable(directory)
    except OSError as error:
        raise ValueError(
            f"the student could not be written to {directory}: {error}. Choose another directory "
            "with export.dirpath"
        ) from error


def check_replaceable(directory: Path, run: str, *, overwrite: bool) -> None:
    """Refuse a directory with something else than a model of this run.

    Args:
        directory: Where the student goes.
        run: Id of the run.
        overwrite: Whether the model of another run may be replaced.

    Raises:
        ValueError: If there is something else.
    """
    if not directory.exists() or not any(directory.iterdir()):
        return
    others = sorted(p.name for p in directory.iterdir() if p.is_dir())
    if others or not (directory / "config.json").exists():
        raise ValueError(
            f"export.dirpath is {directory}, which does not hold only a model: it also has "
            f"{', '.join(others[:3]) or 'files without a config.json'}. Choose another directory"
        )
    if _exporting_run(directory) != run and not overwrite:
        raise ValueError(
            f"there is a model in {directory} already. Choose another export.dirpath, or replace "
            "it with export.overwrite: true"
        )


def write_directory(
    module: DistillationModule,
    weights: dict[str, Any],
    directory: Path,
    run: str,
    context: CardContext,
) -> None:
    """Write to a temporary directory and rename it; remove it if that fails.

    Args:
        module: The method, with its student.
        weights: Of the student.
        directory: Gets its name when all of it is there.
        run: Id of the run.
        context: What the model card says of it.
    """
    fresh = fresh_name(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        changed = write_student(module, weights, fresh)
        (fresh / RUN).write_text(run)
        (fresh / CARD).write_text(str(model_card(context, changed)), encoding="utf-8")
        flush(fresh)
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exporting_run(directory: Path) -> str | None:
    """Return the id of the run that exported a model; None if it was not exported by a run."""
    mark = directory / RUN
    return mark.read_text().strip() if mark.is_file() else None


def _inputs(module: DistillationModule) -> list[tuple[str, str]]:
    """Return directories that a run reads, with their roles; some may be names on the hub."""
    teacher = getattr(module, "teacher", None)
    named = [("student", module.student_spec.name_or_path)]
    named += [("teacher", spec.name_or_path) for spec in getattr(teacher, "model_specs", ())]
    named += [(role, model.name_or_path) for role, model in module.models.items()]
    named.append(("tokenizer", module.tokenizer.name_or_path))
    return [(role, path) for role, path in named if path]
