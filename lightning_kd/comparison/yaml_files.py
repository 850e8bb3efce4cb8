"""YAML files in which no key stands twice."""

from pathlib import Path
from typing import Any

import yaml


def load(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: If there is none, it is no YAML, or a key stands twice in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    text = path.read_text()
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        made = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if root is not None:
        _check_keys(root, path)
    return made


def _check_keys(node: yaml.Node, path: Path) -> None:
    """Validate that no key stands twice, of which YAML keeps the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, path)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and f"{key.value}" in seen:
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value} stands there for the second "
                    "time, and the first would be lost; name each once"
                )
            seen.add(f"{key.value}")
            _check_keys(value, path)
