"""Validation of output files: a run must not write to files that it reads."""

import glob
from pathlib import Path
from typing import Any

import lightning as L


def check_output(data: L.LightningDataModule | None, path: Path, option: str) -> None:
    """Validate that an output file is not a file that the run reads.

    Args:
        data: The data module; None where a loader is used.
        path: Output file.
        option: Name of its option.

    Raises:
        ValueError: If the data is read from that file.
    """
    parts: list[Any] = [data, getattr(data, "prompts", None), getattr(data, "text", None)]
    given = [source for part in parts for source in getattr(part, "paths", {}).values()]
    named = [source for source in given if isinstance(source, str) and source]
    for file in (file for name in named for file in glob.glob(name, recursive=True)):
        if path.exists() and Path(file).samefile(path):
            raise ValueError(
                f"{option} is {str(path)!r}, which this run reads as its data; choose another file"
            )
