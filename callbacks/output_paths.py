"""Files that a run writes, which must not be those it reads."""

import glob
from pathlib import Path
from typing import Any

import lightning as L


def check_output(trainer: L.Trainer, path: Path, option: str) -> None:
    """Refuse to write to a file that the data of the run comes from.

    Args:
        trainer: Has the data module.
        path: Where the run writes.
        option: The name of its option.

    Raises:
        ValueError: If the file is one of the data.
    """
    data: Any = getattr(trainer, "datamodule", None)
    parts = [data, getattr(data, "prompts", None), getattr(data, "text", None)]
    named = [name for part in parts for name in getattr(part, "paths", {}).values() if name]
    for file in (file for name in named for file in glob.glob(name, recursive=True)):
        if path.exists() and Path(file).samefile(path):
            raise ValueError(
                f"{option} is {str(path)!r}, which this run reads as its data; choose another file"
            )
