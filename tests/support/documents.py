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
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = document.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{document} has no {begin} and {end} to put the table between")
    between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    document.write_text(between.sub(lambda _: f"{begin}\n\n{made}\n{end}", text))
