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


def check_end(data: object, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse data whose completions end with a token that the method's tokenizer has for another use.

    Args:
        data: The data module.
        tokenizer: By which the student's tokens are read.

    Raises:
        ValueError: If they do.
    """
    of_data = getattr(getattr(data, "tokenizer", None), "eos_token", None)
    if of_data != tokenizer.eos_token and of_data in tokenizer.get_vocab():
        raise ValueError(
            f"the EOS of the data is {of_data!r}, and that of model.tokenizer is "
            f"{tokenizer.eos_token!r}, by which a teacher with other tokens reads the data's rows: "
            "leave model.tokenizer out, which takes the data's, or give both the same EOS"
        )


def cure_of_length(data: object) -> str:
    """Return what to do about a row of the data that is longer than a teacher reads.

    Args:
        data: The data module; None if there is none.
    """
    name = "data.prompts" if hasattr(data, "prompts") else "data"
    has_limit = hasattr(getattr(data, "prompts", data), "limit")
    drop = f" (set {name}.truncation: drop, and {name}.max_length lower)" if has_limit else ""
    return f"leave the row out{drop}, or take a teacher that reads more"


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
