"""Prompts that the teacher reads in place of the student's, with privileged text in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from lightning_kd.data.encoding import Encoded
from lightning_kd.data.limits import LengthLimit
from lightning_kd.data.rows import Encode
from lightning_kd.data.sources import WHERE
from lightning_kd.data.templates import PromptTemplate

OPTION = "teacher_prompt_template"


@dataclass(frozen=True)
class TeacherPrompts:
    """Templates of the prompts that a teacher reads.

    Args:
        template: Names at least one column beside the prompt's.

    Example:
        >>> prompts = TeacherPrompts.of("{prompt} ({hint})", "prompt", known=[])
        >>> prompts.texts({"hint": ["2"], "__where__": ["a.jsonl:1"]}, ["1+1="])
        ['1+1= (2)']
    """

    template: PromptTemplate

    @classmethod
    def of(
        cls, given: str | list[str] | None, prompt_column: str, *, known: Sequence[str]
    ) -> Self | None:
        """Return the prompts of templates as they are written in a configuration; None without.

        Args:
            given: The templates.
            prompt_column: Column of the prompt.
            known: Columns that the student reads, too.

        Raises:
            ValueError: If no template names a column that the student does not read.
        """
        if given is None:
            return None
        templates = (given,) if isinstance(given, str) else tuple(given)
        template = PromptTemplate(templates, prompt_column, OPTION)
        if not set(template.columns) - {prompt_column, *known}:
            raise ValueError(
                f"{OPTION} names no column that the student's prompt has not, so that the teacher "
                "would be told no more: name that of what only the teacher reads, such as {solution}"
            )
        return cls(template)

    @property
    def columns(self) -> list[str]:
        """All columns, without the prompt's."""
        return [name for name in self.template.columns if name != self.template.prompt_column]

    def texts(
        self, columns: Mapping[str, Sequence[Any]], prompts: Sequence[str | None]
    ) -> list[str]:
        """Return the teacher's prompts of some rows.

        Args:
            columns: The columns of the templates, and places of the rows.
            prompts: The prompt's text of each row.

        Raises:
            ValueError: If a row lacks text of a column that it needs.
        """
        found = []
        for number, prompt in enumerate(prompts):
            row = {name: columns[name][number] for name in self.columns}
            row[self.template.prompt_column] = prompt
            missing = self.template.missing(self.template.chosen(row), row)
            for name in set(missing) - {self.template.prompt_column}:
                raise ValueError(
                    f"{columns[WHERE][number]}: column {name!r} has no text, and {OPTION} tells it to "
                    "the teacher; leave the row out, or make the template a list that ends with one "
                    "that does without"
                )
            found.append(self.template.fill(row))
        return found

    def beside(
        self, encode: Encode, tokens: Callable[[dict[str, list[Any]]], list[list[int]]]
    ) -> Encode:
        """Return a function that encodes rows, and the teacher's prompts beside them.

        Args:
            encode: Encodes the rows as the student reads them.
            tokens: Returns the tokens of the teacher's prompts.
        """

        def both(columns: dict[str, list[Any]]) -> list[Encoded]:
            rows = encode(columns)
            return [
                replace(row, teacher_prompt=prompt)
                for row, prompt in zip(rows, tokens(columns), strict=True)
            ]

        return both


def check_teacher_length(limit: LengthLimit, prompts: TeacherPrompts | None) -> None:
    """Refuse a limit on what nobody reads.

    Raises:
        ValueError: If there is one, and the teacher reads what the student does.
    """
    if limit.max_teacher_length is not None and prompts is None:
        raise ValueError(
            f"max_teacher_length is {limit.max_teacher_length}, and the teacher reads the student's "
            f"rows, which max_length limits; give {OPTION} as well, or leave it out"
        )
