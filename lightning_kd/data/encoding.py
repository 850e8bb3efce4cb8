"""From a row to tokens: what is prompt, what is completion, and what happens to long rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from lightning_kd.option_checks import check_choice
from lightning_kd.tokenization import begun, special_token_frame, tokens_of

TruncationPolicy = Literal["error", "drop", "left", "right"]
DocumentPolicy = Literal["error", "drop", "right", "windows"]
"""What happens to a document that is too long; ``windows`` makes a row of each part."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Example:
    """The tokens of a row, and which of them the loss is on."""

    input_ids: list[int]
    prompt_length: int = 0
    prompt: str | None = None
    """Text of the prompt; None where there are no prompts (packed text)."""
    completion: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row."""
    trained: Sequence[bool] = ()
    """Whether the loss is on each token; empty for those from ``prompt_length`` on."""
    references: Sequence[str] | None = None
    """Texts that a completion is compared with. Defaults to ``completion`` alone; empty for none."""
    tokenized_apart: bool = False
    """Whether what is trained on was tokenized as a text of its own, not as the prompt's rest."""
    document: int | None = None
    """Number of the row or document in the data as given, where it is another than the row's."""


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

    Raises:
        ValueError: If a value is out of its range.
    """

    max_length: int
    max_prompt_length: int | None = None
    truncation: TruncationPolicy | DocumentPolicy = "error"

    def __post_init__(self) -> None:
        """Check the values."""
        choices = dict.fromkeys((*get_args(TruncationPolicy), *get_args(DocumentPolicy)))
        check_choice("truncation", self.truncation, tuple(choices))
        for name in ("max_length", "max_prompt_length"):
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


@dataclass(frozen=True)
class Encoded:
    """A row as tokens, before any limit on its length."""

    prompt: list[int]
    completion: list[int]
    """Tokens that are trained on; of a document, all."""
    prompt_text: str | None = None
    """None for a document, which has no prompt."""
    completion_text: str = ""
    after_eos: str = ""
    """Text after the first EOS of the completion, which is left out."""
    trained: Sequence[bool] = ()
    """Whether each token of both is trained on; empty for those of the completion."""
    remarks: Sequence[str] = ()
    """What else to say of the row, in words that follow "of 10 rows, 3"."""
    references: Sequence[str] | None = None
    """Texts that a completion is compared with. Defaults to ``completion_text`` alone."""
    tokenized_apart: bool = False
    """Whether what is trained on was tokenized as a text of its own, not as the prompt's rest."""


@dataclass(frozen=True)
class EncodedCompletion:
    """The tokens of a completion up to its first EOS, and the text after it."""

    ids: list[int]
    after_eos: str = ""


def encode_documents(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_eos: bool
) -> list[list[int]]:
    """Return tokens of documents, each framed as the tokenizer frames a text.

    Args:
        texts: One document each.
        tokenizer: Decides what a document begins with (BOS, or nothing).
        add_eos: Whether each ends with an EOS, once, also where the tokenizer appends none. Without,
            none is at the end, also where the tokenizer appends one.
    """
    before, after = special_token_frame(tokenizer)
    eos = tokenizer.eos_token_id
    without_eos = [token for token in after if token != eos]
    with_eos = after if eos in after else [*after, eos]
    return [
        begun(ids, before) + (with_eos if add_eos and ids[-1:] != [eos] else without_eos)
        for ids in tokens_of(texts, tokenizer)
    ]


def encode_completions(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, ended: Sequence[bool] | None = None
) -> list[EncodedCompletion]:
    """Return tokens of completions, each ending with the EOS, which is trained on.

    Args:
        texts: One completion each.
        tokenizer: Gives the EOS.
        ended: Whether each completion ended; the others get no EOS. Defaults to all.
    """
    return [
        end_with_eos(ids, tokenizer, ended=ended is None or ended[number])
        for number, ids in enumerate(tokens_of(texts, tokenizer))
    ]


def end_with_eos(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, *, ended: bool = True
) -> EncodedCompletion:
    """Cut after the first EOS; if there is none and the text has ended, append one."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return EncodedCompletion([*ids, eos] if ended else ids)
    end = ids.index(eos) + 1
    # A template's own line break behind the EOS is no text that anyone would miss.
    rest = tokenizer.decode(ids[end:], skip_special_tokens=True).strip()
    return EncodedCompletion(ids[:end], rest)
