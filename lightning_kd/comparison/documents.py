"""Tables that commands write into documents, each between two marks of its own."""

import re
from pathlib import Path


def replace_between_marks(document: Path, name: str, made: str) -> None:
    """Put text between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Args:
        document: The file.
        name: Of the marks.
        made: What goes between them.

    Raises:
        ValueError: If the document has no such marks.
    """
    check_marks(document, name)
    begin, end = _marks(name)
    between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    text = document.read_text()
    document.write_text(between.sub(lambda _: f"{begin}\n\n{made}\n{end}", text))


def check_marks(document: Path, name: str) -> None:
    """Validate that a document has the marks, the first before the second.

    Args:
        document: The file.
        name: Of the marks.

    Raises:
        ValueError: If it has not.
    """
    begin, end = _marks(name)
    text = document.read_text()
    if begin not in text or end not in text.partition(begin)[2]:
        raise ValueError(f"{document} has no {begin} and {end} to put the table between")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
