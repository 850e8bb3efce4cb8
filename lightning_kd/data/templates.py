"""Templates of prompts: text with the names of columns in braces."""

import re
from collections.abc import Iterable, Mapping
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

    def __post_init__(self) -> None:
        """Check the templates."""
        if not self.templates:
            raise ValueError("prompt_template is an empty list; give a text or several")
        for text in self.templates:
            wrong = _MORE_THAN_A_NAME.search(text)
            if wrong:
                raise ValueError(
                    f"prompt_template has {wrong[0]}; it takes names of columns alone, as {{prompt}}"
                )
            if not _NAME.search(text):
                raise ValueError(
                    f"prompt_template {text!r} lacks the place of {{prompt}}, or of another column"
                )
        if self.prompt_column not in {"prompt", *self.columns}:
            raise ValueError(
                f"prompt_column is {self.prompt_column!r}, and prompt_template has neither {{prompt}} "
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
        for text in self.templates[:-1]:
            if all(row.get(name) for name in self._named(text)):
                return self._filled(text, row)
        return self._filled(self.templates[-1], row)

    def _named(self, text: str) -> Iterable[str]:
        return (self._column(name) for name in _NAME.findall(text))

    def _column(self, name: str) -> str:
        return self.prompt_column if name == "prompt" else name

    def _filled(self, text: str, row: Mapping[str, str | None]) -> str:
        return _NAME.sub(lambda found: row[self._column(found[1])] or "", text)
