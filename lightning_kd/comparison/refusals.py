"""What no run of a comparison may be given, refused by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_kd.comparison.options import flat
from lightning_kd.comparison.placeholders import placeholders
from lightning_kd.comparison.yaml_files import load

_OURS = re.compile(
    r"(trainer\.logger|trainer\.default_root_dir|trainer\.(.*\.)?dirpath|non_finite\.dirpath"
    r"|export\.dirpath|export\.push_to_hub|seed_everything|ckpt_path)(?=\.|$)"
)
"""Options that say where a run's files go and what it begins with, which a comparison decides."""

_STUDENT = "model.init_args.student"


def check_options(files: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> None:
    """Validate that a run is not told what a comparison decides.

    Args:
        files: Configuration files.
        layers: Options.

    Raises:
        ValueError: If it is.
    """
    for part in [*(load(Path(file)) for file in files), *layers]:
        for name, value in flat(part).items():
            found = _OURS.match(name.replace("+.", ".").removesuffix("+"))
            if found and value is not None:
                raise ValueError(
                    f"{found[0]} is given, but a comparison puts each run into a directory of its "
                    "own and gives it its seed; leave it out"
                )


def check_files(files: Sequence[str], known: Collection[str]) -> None:
    """Validate that no configuration file holds a word in braces that an experiment file fills in.

    Args:
        files: Configuration files.
        known: Names that are filled in.

    Raises:
        ValueError: If one does.
    """
    for file in files:
        for name in placeholders(load(Path(file))):
            if name in known:
                raise ValueError(
                    f"{{{name}}} stands in {file}, where nothing is filled in; give the option in the "
                    "experiment file"
                )


def check_tested(layers: Sequence[Mapping[str, Any]]) -> None:
    """Validate that a test is of the student that the run has trained.

    Args:
        layers: Options of the test.

    Raises:
        ValueError: If it is of another.
    """
    for name, value in (item for layer in layers for item in flat(layer).items()):
        if f"{name}.".startswith(f"{_STUDENT}."):
            raise ValueError(
                f"test.{name} is {value}, but a run is tested with the student that it has trained; "
                "leave it out"
            )


def check_split(test: Mapping[str, Any], stage: str) -> None:
    """Validate that data that are read from files have those that are measured on.

    Args:
        test: The whole configuration of the test.
        stage: Its command.

    Raises:
        ValueError: If they have not.
    """
    split, data = {"test": "test", "validate": "validation"}[stage], test["data"]
    options = data.get("init_args", {})
    if "train" in options and split in options and options[split] is None:
        raise ValueError(
            f"the metrics are of the {split} split, but data.{split} is not given; give it, or choose "
            "metrics of the other split (test/..., val/...)"
        )
