"""From a row to tokens: what is prompt, what is completion, and what happens to long rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

TruncationPolicy = Literal["error", "drop", "left", "right"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """The tokens of a row; the loss is on those from ``prompt_length`` on."""

    input_ids: list[int]
    prompt_length: int = 0
    prompt: str | None = None
    """Text of the prompt; None where there are no prompts (packed text)."""
    completion: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row."""


@dataclass(frozen=True)
class LengthLimit:
    """What happens to a row that is too long.

    Args:
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens; no limit of its own when not given.
        truncation: ``error`` refuses the data, ``drop`` leaves the row out, ``left`` cuts the
            beginning of the prompt, ``right`` cuts the end of the completion (which then has no EOS)
            and of the prompt. What was dropped or cut is counted and logged.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_length: int
    max_prompt_length: int | None = None
    truncation: TruncationPolicy = "error"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.truncation not in get_args(TruncationPolicy):
            raise ValueError(
                f"unknown truncation {self.truncation!r}; choose one of {get_args(TruncationPolicy)}"
            )
        for name in ("max_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")

    def apply(
        self, prompt: list[int], completion: list[int], where: str
    ) -> tuple[list[int], list[int]] | None:
        """Prompt and completion within the limits, or None for a dropped row.

        Raises:
            ValueError: If the row is too long and the policy is ``error``.

        Example:
            >>> limit = LengthLimit(max_length=4, truncation="left")
            >>> limit.apply([1, 2, 3], [4, 5], "row")
            ([2, 3], [4, 5])
        """
        longest_prompt = self.max_prompt_length or self.max_length
        if len(prompt) <= longest_prompt and len(prompt) + len(completion) <= self.max_length:
            return prompt, completion
        if self.truncation == "error":
            raise ValueError(
                f"{where}: the prompt has {len(prompt)} tokens and the completion "
                f"{len(completion)}; allowed are {longest_prompt} for the prompt and "
                f"{self.max_length} together. Raise max_length or max_prompt_length, or choose "
                "truncation: drop, left or right"
            )
        if self.truncation == "drop":
            return None
        if self.truncation == "left":
            room = min(longest_prompt, self.max_length - len(completion))
            return None if room < 1 else (prompt[-room:], completion)
        kept = (
            prompt[:longest_prompt],
            completion[: max(0, self.max_length - len(prompt[:longest_prompt]))],
        )
        nothing_to_learn = completion and not kept[1]
        return None if nothing_to_learn else kept


Encoded = tuple[list[int], list[int], str, str]
"""Tokens of prompt and completion, then their texts."""


def encode_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of prompts: with the tokenizer's own BOS, without an EOS at their end."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    batch: list[list[int]] = tokenizer(texts)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == eos != bos else ids for ids in batch]


def encode_completions(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of completions, each ending with the EOS, which is trained on."""
    batch = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [end_with_eos(ids, tokenizer) for ids in batch]


def end_with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut after the first EOS, or append one."""
    eos = tokenizer.eos_token_id
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


def encode_chats(
    chats: list[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, where: list[str]
) -> list[Encoded]:
    """Tokens and texts of prompts and completions, by the tokenizer's chat template.

    The completion is the last message, the assistant's; the prompt is everything before it.

    Raises:
        ValueError: If the messages are not a chat that ends with the assistant, the tokenizer has no
            template, or its template changes earlier messages when one is added.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use one that has, or prompt columns")
    texts = [_render(chat, tokenizer, place) for chat, place in zip(chats, where, strict=True)]
    prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=False)["input_ids"]
    completions = encode_completions([completion for _, completion in texts], tokenizer)
    return [
        (prompt, completion, text, str(chat[-1]["content"]))
        for prompt, completion, (text, _), chat in zip(
            prompts, completions, texts, chats, strict=True
        )
    ]


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, str]:
    """Texts of prompt and completion, with the template's own marks."""
    _check_messages(messages, where)
    try:
        prompt: str = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from error
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template does not render the prompt as the beginning of the whole "
            f"chat, so prompt and completion cannot be told apart: {prompt[-60:]!r}"
        )
    return prompt, whole[len(prompt) :]


def _check_messages(messages: list[dict[str, Any]], where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a message needs role and content, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{where}: unknown role {message.get('role')!r}; choose one of {ROLES}"
            )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: a chat needs a prompt and, at its end, the assistant's message")
