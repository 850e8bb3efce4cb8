"""Limits on the lengths of rows, and what happens to longer ones."""

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from lightning_kd.option_checks import check_choice

TruncationPolicy = Literal["error", "drop", "left", "right"]
DocumentPolicy = Literal["error", "drop", "right", "windows"]
"""What happens to a document that is too long; ``windows`` makes a row of each part."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LengthLimit:
    """Limit on the length of rows, and what happens to longer ones.

    Args:
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens. Defaults to no limit of its own.
        truncation: ``error`` refuses the data, ``drop`` leaves the row out, ``left`` cuts the
            beginning of the prompt, ``right`` cuts the end of the completion (which then has no EOS)
            and of the prompt. What was dropped or cut is counted and logged. ``windows``, for
            documents alone, makes several rows of one.
        max_teacher_length: Longest prompt of the teacher and completion together, in tokens; what the
            teacher reads is never cut. Defaults to ``max_length``.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_length: int
    max_prompt_length: int | None = None
    truncation: TruncationPolicy | DocumentPolicy = "error"
    max_teacher_length: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        choices = dict.fromkeys((*get_args(TruncationPolicy), *get_args(DocumentPolicy)))
        check_choice("truncation", self.truncation, tuple(choices))
        for name in ("max_length", "max_prompt_length", "max_teacher_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")

    def apply(
        self, prompt: list[_Item], completion: list[_Item], where: str
    ) -> tuple[list[_Item], list[_Item]] | None:
        """Return prompt and completion within the limits, or None for a dropped row.

        Args:
            prompt: Tokens, or anything that stands for one each.
            completion: The same.
            where: The place of the row.

        Raises:
            ValueError: If the row is too long and the policy is ``error``.

        Example:
            >>> limit = LengthLimit(max_length=4, truncation="left")
            >>> limit.apply([1, 2, 3], [4, 5], "row")
            ([2, 3], [4, 5])
        """
        longest_prompt = self.max_prompt_length or self.max_length
        if prompt and self.truncation == "windows":
            raise ValueError(
                f"{where}: truncation is windows, which are parts of documents, and this row has a "
                "prompt; choose error, drop, left or right"
            )
        if len(prompt) <= longest_prompt and len(prompt) + len(completion) <= self.max_length:
            return prompt, completion
        if self.truncation == "error":
            lengths = len(prompt), len(completion)
            raise ValueError(f"{where}: {self._too_long(*lengths, longest_prompt)}")
        if self.truncation == "drop":
            return None
        if self.truncation == "left":
            room = min(longest_prompt, self.max_length - len(completion))
            return None if room < 1 else (prompt[-room:], completion)
        kept_prompt = prompt[:longest_prompt]
        return kept_prompt, completion[: max(0, self.max_length - len(kept_prompt))]

    def takes_teacher(self, prompt: int, completion: int, where: str) -> bool:
        """Return whether a row stays for what its teacher reads; false for a dropped row.

        Args:
            prompt: Tokens of the teacher's prompt.
            completion: Tokens of the completion, as far as it was kept.
            where: The place of the row.

        Raises:
            ValueError: If that is too long, and the policy is not to drop the row.
        """
        longest = self.max_teacher_length or self.max_length
        if prompt + completion <= longest:
            return True
        if self.truncation == "drop":
            return False
        raise ValueError(
            f"{where}: the teacher reads {prompt} tokens of its prompt and {completion} of the "
            f"completion; allowed are {longest} together, and its prompt is never cut. Raise "
            "max_teacher_length (or max_length), or choose truncation: drop"
        )

    def windows(self, document: list[_Item]) -> list[list[_Item]]:
        """Return a document in the parts that become rows: itself, unless the policy is ``windows``.

        Each window begins with the last token of the one before, which is not scored again, so that
        every token but the first of the document is scored once.

        Example:
            >>> LengthLimit(3, truncation="windows").windows([1, 2, 3, 4, 5, 6])
            [[1, 2, 3], [3, 4, 5], [5, 6]]
        """
        if self.truncation != "windows" or len(document) <= self.max_length:
            return [document]
        starts = range(0, len(document) - 1, self.max_length - 1)
        return [document[start : start + self.max_length] for start in starts]

    def _too_long(self, prompt: int, completion: int, longest_prompt: int) -> str:
        if not prompt:
            return (
                f"the document has {completion} tokens; allowed are {self.max_length}. Raise "
                "max_length, or choose truncation: drop, right or windows"
            )
        return (
            f"the prompt has {prompt} tokens and the completion {completion}; allowed are "
            f"{longest_prompt} for the prompt and {self.max_length} together. Raise max_length or "
            "max_prompt_length, or choose truncation: drop, left or right"
        )
