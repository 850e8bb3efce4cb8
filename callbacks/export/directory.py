"""The directory of an exported student: what may be replaced, and how it is written."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_kd.callbacks.export.card import CardContext, model_card
from lightning_kd.callbacks.export.options import CARD
from lightning_kd.callbacks.export.student import write_student
from lightning_kd.filesystem import check_writable, flush, replace_directory
from lightning_kd.modules import DistillationModule

RUN = ".run"
"""File in the exported directory: the id of the run, and the names of what was exported, by line."""

_OF_A_MODEL = [
    *("config.json", "generation_config.json", CARD, RUN),
    *(
        "model*.safetensors",
        "model.safetensors.index.json",
        "pytorch_model*.bin*",
        "adapter_model.*",
    ),
    *("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "modeling_*.py", "configuration_*.py"),
]
"""Files that make up a model that no run has exported; all others are somebody's own."""


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
        _fresh_name(directory).exists()
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
    others = _others(directory)
    if others or not (directory / "config.json").exists():
        raise ValueError(
            f"export.dirpath is {directory}, which does not hold only a model: it also has "
            f"{', '.join(others[:3]) or 'files without a config.json'}. Nothing of it was touched: "
            "move that elsewhere, or choose another directory"
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
    *,
    overwrite: bool,
) -> None:
    """Write to a temporary directory and rename it; remove it if that fails.

    The temporary one is its own: another process may be writing for the same name.

    Args:
        module: The method, with its student.
        weights: Of the student.
        directory: Gets its name when all of it is there.
        run: Id of the run.
        context: What the model card says of it.
        overwrite: Whether the model of another run may be replaced.

    Raises:
        ValueError: If something else has got the name in the meantime.
    """
    fresh = _fresh_name(directory)
    try:
        fresh.mkdir(parents=True)
        changed = write_student(module, weights, fresh)
        (fresh / CARD).write_text(str(model_card(context, changed)), encoding="utf-8")
        names = sorted(path.name for path in fresh.iterdir())
        (fresh / RUN).write_text("\n".join([run, *names]), encoding="utf-8")
        flush(fresh)
        check_replaceable(directory, run, overwrite=overwrite)
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _fresh_name(directory: Path) -> Path:
    """Return a name beside a directory that no other process writes to."""
    return directory.with_name(f"{directory.name}.fresh.{uuid4().hex[:8]}")


def _others(directory: Path) -> list[str]:
    """Return the names of what is there beside a model."""
    exported = _mark(directory)[1:]
    known = [RUN, *exported] if exported else []
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_dir()
        or not (path.name in known if known else any(fnmatch(path.name, n) for n in _OF_A_MODEL))
    )


def _exporting_run(directory: Path) -> str | None:
    """Return the id of the run that exported a model; None if it was not exported by a run."""
    return next(iter(_mark(directory)), None)


def _mark(directory: Path) -> list[str]:
    """Return the id of the run and the names of what it exported; earlier versions wrote no names."""
    mark = directory / RUN
    return mark.read_text(encoding="utf-8").strip().splitlines() if mark.is_file() else []


def _inputs(module: DistillationModule) -> list[tuple[str, str]]:
    """Return directories that a run reads, with their roles; some may be names on the hub."""
    teacher = getattr(module, "teacher", None)
    named = [("student", module.student_spec.name_or_path)]
    named += [("teacher", spec.name_or_path) for spec in getattr(teacher, "model_specs", ())]
    named += [(role, model.name_or_path) for role, model in module.models.items()]
    named.append(("tokenizer", module.tokenizer.name_or_path))
    return [(role, path) for role, path in named if path]
