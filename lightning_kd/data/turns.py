"""The text of a conversation by its chat template, and the characters of it that are trained on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_kd.data.conversations import Chat, Message, text_of_content
from lightning_kd.data.left_out import Coverage

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PARTS = ("first part", "second part")
_READ_AS_GIVEN = ("system", "developer", "user")
"""Roles whose text every template leaves as it is, but for white space around it."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: Prompt and answer; of a chat that only a model answers, the prompt.
        prompt: Characters of the prompt, which ends where the answer begins.
        spans: Where what is trained on begins and ends, in characters, in order.
        changed: Whether the template changes an answer that is trained on.
        unread: Whether it leaves out the ``reasoning_content`` of one.
    """

    text: str
    prompt: int
    spans: Sequence[tuple[int, int]] = ()
    changed: bool = False
    unread: bool = False


class TemplateMisfitError(ValueError):
    """A conversation that a template renders so that it cannot be trained on as asked."""


class ChatTemplate:
    """Renderer of conversations by a tokenizer's template, for :func:`render_chats` alone.

    Args:
        tokenizer: Has the template.
        arguments: Further variables of the template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = {**tokenizer.special_tokens_map, **(arguments or {})}
        self._takes_parts: bool | None = None
        self._coverage = Coverage(
            lambda chat: self._text(chat.messages, chat, add_generation_prompt=not chat.trained)
        )

    def rendered(self, chat: Chat) -> RenderedChat:
        """Return a conversation as text, with what is trained on.

        A template with ``{% generation %}`` marks what the assistant says itself. With any other,
        a turn goes from the end of the prompt that a model would get there to the end of the
        rendered turn.

        Raises:
            TemplateMisfitError: If a turn is rendered otherwise than when it was the last one, or
                the template leaves out something that the conversation holds.
        """
        if any(isinstance(message.get("content"), list) for message in chat.messages):
            chat = chat if self._has_parts() else _joined(chat)
        lost, unread = self._coverage.of(chat)
        prompt = self._text(chat.prompt, chat, add_generation_prompt=True)
        if not chat.trained:
            _check_nothing_left_out(chat.prompt, prompt, lost)
            return RenderedChat(prompt, len(prompt))
        text, marks = self._marked(chat)
        spans, changed = [], False
        for number in chat.trained:
            start, end = self._turn(chat, number, text)
            said = text_of_content(chat.messages[number].get("content")).strip()
            changed |= said not in text[start:end]
            if marks is None:
                spans.append((start, end))
                continue
            own = [(max(a, start), b) for a, b in marks if max(a, start) < min(b, end)]
            if not own:
                raise TemplateMisfitError(
                    f"marks nothing of message {number + 1} by {{% generation %}}, so nothing of it "
                    "would be trained on; correct the template"
                )
            spans += [(a, self._with_eos(text, b)) for a, b in own]
        _check_nothing_left_out(chat.prompt, prompt, lost)
        return RenderedChat(text, len(prompt), spans, changed, unread)

    def _turn(self, chat: Chat, number: int, text: str) -> tuple[int, int]:
        """Return where a turn begins and ends in the text of the whole conversation."""
        before = self._text(chat.messages[:number], chat, add_generation_prompt=True)
        last = number == len(chat.messages) - 1
        through = text if last else self._text(chat.messages[: number + 1], chat)
        if not text.startswith(before) and last:
            raise TemplateMisfitError(
                "does not render the prompt as the beginning of the whole chat, so prompt and "
                f"completion cannot be told apart: {before[-60:]!r}. If it has an option for this "
                "(as enable_thinking), set it in data.chat_template_kwargs; or give prompt and "
                "completion as text, to PromptCompletionData"
            )
        if not (through.startswith(before) and text.startswith(through)):
            raise TemplateMisfitError(
                f"renders message {number + 1} otherwise once another follows it, as templates do "
                "that take out earlier thinking: a model that answers there sees other tokens. Set "
                "data.train_on: each, for a row of its own for each answer, as the model would give "
                "it, or last"
            )
        return len(before), len(through)

    def _with_eos(self, text: str, end: int) -> int:
        """Return the end of a mark, or that of an EOS right behind it: a turn is learned to end."""
        eos = str(self._tokenizer.eos_token)
        return end + len(eos) if text.startswith(eos, end) else end

    def _text(self, messages: Sequence[Message], chat: Chat, **options: Any) -> str:
        return self._render(messages, chat, **options)[0]

    def _marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]] | None]:
        tools = chat.tools and list(chat.tools)
        template = self._tokenizer.get_chat_template(tools=tools)
        if not _MARKED.search(template):
            return self._text(chat.messages, chat), None
        return self._render(chat.messages, chat, return_assistant_tokens_mask=True)

    def _render(
        self, messages: Sequence[Message], chat: Chat, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render what ``apply_chat_template`` does, which keeps the places of the marks to itself."""
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        tools = chat.tools and list(chat.tools)
        texts, marks = render_jinja_template(
            [given],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(tools=tools),
            **options,
            **self._variables,
        )
        return texts[0], marks[0] if marks else []

    def _has_parts(self) -> bool:
        """Return whether the template reads a list of parts, rather than to print it."""
        if self._takes_parts is None:
            parts = [{"type": "text", "text": text} for text in _PARTS]
            probe = Chat([{"role": "user", "content": parts}], "")
            try:
                text = self._text(probe.messages, probe)
            except Exception:  # whatever a template does with what it does not expect
                text = ""
            self._takes_parts = all(part in text for part in _PARTS) and "'type'" not in text
        return self._takes_parts


def _joined(chat: Chat) -> Chat:
    """Return a chat whose contents are texts, for templates that know no parts."""
    joined = [
        message | {"content": text_of_content(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in chat.messages
    ]
    return replace(chat, messages=joined)


def _check_nothing_left_out(messages: Sequence[Message], text: str, lost: str | None) -> None:
    if lost is not None:
        raise _left_out(lost)
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        if message["role"] in _READ_AS_GIVEN and any(part.strip() not in text for part in parts):
            raise _left_out(f"message {number}, of role {message['role']!r}")


def _left_out(what: str) -> TemplateMisfitError:
    return TemplateMisfitError(
        f"leaves out {what}, or changes its text, and a model would never see it; leave it out of the "
        "rows, or take a template that has a place for it"
    )
