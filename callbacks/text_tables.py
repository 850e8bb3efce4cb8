"""Tables of text in every logger that can show one."""

import html
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger


@runtime_checkable
class LogsTables(Protocol):
    """A logger with a method for tables, as ``WandbLogger`` has it."""

    def log_table(
        self, key: str, columns: list[str], data: list[list[str]], *, step: int | None
    ) -> None:
        """Log a table under a name."""


@runtime_checkable
class LogsTexts(Protocol):
    """A logger that calls the same method by another name."""

    def log_text(
        self, key: str, columns: list[str], data: list[list[str]], *, step: int | None
    ) -> None:
        """Log a table of text under a name."""


def loggers_of_tables(trainer: L.Trainer) -> list[Logger]:
    """Return the loggers of a trainer that can show a table of text."""
    kinds = (TensorBoardLogger, LogsTables, LogsTexts)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def log_table(
    trainer: L.Trainer, name: str, header: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    """Log a table of text to every logger that can show it.

    Args:
        trainer: Has the loggers.
        name: Of the table.
        header: A name for each column.
        rows: Texts, shown literally.
        step: Number of the optimizer step.
    """
    columns, data = list(header), [list(row) for row in rows]
    for logger in loggers_of_tables(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, data), step)
        elif isinstance(logger, LogsTables):
            logger.log_table(name, columns, data, step=step)
        elif isinstance(logger, LogsTexts):
            logger.log_text(name, columns, data, step=step)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a markdown table whose cells are shown literally, without interpreting markup.

    Example:
        >>> print(markdown_table(("a", "b"), [("<b>|x|", "1\n2")]))
        | a | b |
        | --- | --- |
        | &lt;b&gt;&#124;x&#124; | 1<br>2 |
    """
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    escaped = html.escape(text, quote=False)
    for markup in "|*_`[]!\\":
        escaped = escaped.replace(markup, f"&#{ord(markup)};")
    return escaped.replace("\n", "<br>")
