"""The lowest versions that pyproject.toml allows, as constraints of pip."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def lower_bounds(pyproject: str) -> Iterator[str]:
    """Yield the lowest version of each package that the library imports.

    What only the tests need is not pinned.

    Args:
        pyproject: Text of pyproject.toml.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"]]
    needed += [
        line for name in ("lora", "plot", "completion", "quantization") for line in extras[name]
    ]
    for requirement in needed:
        found = re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} of pyproject.toml has no lower bound: NAME>=VERSION")
        yield f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    print("\n".join(lower_bounds(PYPROJECT.read_text())))
