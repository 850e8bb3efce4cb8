"""What data a teacher with other tokens can read."""

from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import TEACHER_PROMPT
from lightning_kd.tokenization import TokenizerLike, tokenizer_of


@runtime_checkable
class ChatLike(Protocol):
    """Data whose prompts a chat template renders."""

    teacher_tokenizer: TokenizerLike | None
    train_on: str
    extra_columns: list[str]


class WithoutLengths:
    """Data whose lengths, which are in the student's tokens, say nothing of the teacher's rows."""

    def __init__(self, data: object) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        """Return what the data have under the name, but for their lengths."""
        if name == "longest":
            raise AttributeError(name)
        return getattr(self._data, name)


def check_chats(data: ChatLike, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse chats that the teacher could not read as its template has them.

    Raises:
        ValueError: If there are several answers in a row, or the prompts are not rendered for it.
    """
    if data.train_on == "all":
        raise ValueError(
            "data.train_on is all, and a teacher with other tokens reads one prompt and one answer: "
            "set data.train_on: each"
        )
    if TEACHER_PROMPT in data.extra_columns:
        return
    given = data.teacher_tokenizer
    other = None if given is None else tokenizer_of(given)
    same = other is not None and (
        other.get_vocab() == tokenizer.get_vocab()
        and other.chat_template == tokenizer.chat_template
    )
    if not same:
        raise ValueError(
            f"data.teacher_tokenizer is {given!r:.60}, so the teacher would not read chats as its own "
            "template has them: set it to the teacher's tokenizer (or give the prompts as it reads "
            f"them in a column {TEACHER_PROMPT} of data.extra_columns)"
        )
