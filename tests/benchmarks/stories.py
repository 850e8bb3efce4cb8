"""What the benchmarks on short stories share: the text, the student, and a first part of a file."""

from itertools import islice
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Folder with ``models/stories260K`` and ``tinystories``."""

STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

STORIES = 3_000
"""Stories that a student reads."""


def head(source: Path, lines: int, out: Path) -> str:
    """Copy the first lines of a file."""
    with source.open() as texts:
        out.write_text("".join(islice(texts, lines)))
    return str(out)
