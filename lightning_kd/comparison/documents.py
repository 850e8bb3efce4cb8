"""Tables that commands write into documents, each between two marks of its own."""

import re
from pathlib import Path

from lightning_kd.filesystem import write_text


def replace_between_marks(document: Path, name: str, made: str) -> None:
    """Put text between ``<!-- NAME -->`` and the first ``<!-- end of NAME -->`` behind it.

    The document is there as a whole at any time, and keeps its line ends.

    Args:
        document: The file.
        name: Of the marks.
        made: What goes between them.

    Raises:
        ValueError: If the document has no such marks, or begins twice.
    """
    check_marks(document, name)
    begin, end = _marks(name)
    text = _text_of(document)
    before, _, behind = text.partition(begin)
    lines = f"{begin}\n\n{made}\n{end}"
    if "\r\n" in text:
        lines = re.sub("\r?\n", "\r\n", lines)
    write_text(document.resolve(), before + lines + behind.partition(end)[2])


def check_marks(document: Path, name: str) -> None:
    """Validate that a document has the marks, the first one once and before the second.

    Args:
        document: The file.
        name: Of the marks.

    Raises:
        ValueError: If it has not.
    """
    begin, end = _marks(name)
    text = _text_of(document)
    if begin not in text or end not in text.partition(begin)[2]:
        raise ValueError(f"{document} has no {begin} and {end} to put the table between")
    if text.count(begin) > 1:
        raise ValueError(
            f"{document} has {begin} {text.count(begin)} times; it must be there once, and not be "
            "mentioned in the text"
        )


def _text_of(document: Path) -> str:
    return document.read_bytes().decode("utf-8")  # read_text() changes the line ends


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
