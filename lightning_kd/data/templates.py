"""Templates of prompts: text with the names of columns in braces."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

_NAME = re.compile(r"\{([^\W\d]\w*)\}")
_MORE_THAN_A_NAME = re.compile(r"\{[^\W\d]\w*[.\[!:][^{}]*\}")


@dataclass(frozen=True)
class PromptTemplate:
    """Texts around columns of a row, of which the first is taken whose columns all have text.

    ``{name}`` stands for the column of that name, ``{prompt}`` for that of the prompt. Nothing else
    is replaced: text of a row is never a template, and a template reads no attributes.

    Args:
        templates: At least one; the last is taken where no other can be.
        prompt_column: Column of the prompt.
        option: Name of the templates in messages.

    Raises:
        ValueError: If a template names no column or has more than names in its braces, or none has
            the prompt's column.

    Example:
        >>> template = PromptTemplate(("{task}: {input}", "{task}"), "task")
        >>> template.fill({"task": "Sort", "input": "b a"}), template.fill({"task": "Sing"})
        ('Sort: b a', 'Sing')
    """

    templates: tuple[str, ...]
    prompt_column: str = "prompt"
    option: str = "prompt_template"

    def __post_init__(self) -> None:
        """Check the templates."""
        if not self.templates:
            raise ValueError(f"{self.option} is an empty list; give a text or several")
        for text in self.templates:
            wrong = _MORE_THAN_A_NAME.search(text)
            if wrong:
                raise ValueError(
                    f"{self.option} has {wrong[0]}; it takes names of columns alone, as {{prompt}}"
                )
            if not _NAME.search(text):
                raise ValueError(
                    f"{self.option} {text!r} lacks the place of {{prompt}}, or of another column"
                )
        if self.prompt_column not in {"prompt", *self.columns}:
            raise ValueError(
                f"prompt_column is {self.prompt_column!r}, and {self.option} has neither {{prompt}} "
                f"nor {{{self.prompt_column}}}; put it in, or leave prompt_column out"
            )

    @property
    def columns(self) -> list[str]:
        """Every column that a template names."""
        return list(dict.fromkeys(name for text in self.templates for name in self._named(text)))

    @property
    def required(self) -> list[str]:
        """The columns that every row needs: those of the last template."""
        return list(dict.fromkeys(self._named(self.templates[-1])))

    def fill(self, row: Mapping[str, str | None]) -> str:
        """Return the prompt of a row.

        Args:
            row: Text of each column; None where a row has none.
        """
        text = self.chosen(row)
        return _NAME.sub(lambda found: row[self._column(found[1])] or "", text)

    def chosen(self, row: Mapping[str, str | None]) -> str:
        """Return the template of a row, the last one where no other has all its columns."""
        for text in self.templates[:-1]:
            if not self.missing(text, row):
                return text
        return self.templates[-1]

    def missing(self, text: str, row: Mapping[str, str | None]) -> list[str]:
        """Return the columns of a template that have no text in a row."""
        return [name for name in self._named(text) if not row.get(name)]

    def check_columns(
        self, rows: Mapping[str, Sequence[str | None]], required: Container[str], split: str
    ) -> None:
        """Validate that the columns that a row may do without have text in one.

        Args:
            rows: All columns.
            required: Those that every row has.
            split: Of the data, for the message.

        Raises:
            ValueError: If none has.
        """
        maybe = sorted(set(self.columns) - {name for name in self.columns if name in required})
        unknown = [name for name in maybe if not any(rows[name])]
        if unknown:
            raise ValueError(
                f"no row of data.{split} has text in the column {unknown[0]!r}, which "
                f"data.{self.option} names; correct it, or leave that template out"
            )

    def _named(self, text: str) -> Iterable[str]:
        return (self._column(name) for name in _NAME.findall(text))

    def _column(self, name: str) -> str:
        return self.prompt_column if name == "prompt" else name
