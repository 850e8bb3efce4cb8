"""What a chat template leaves out of a conversation without a word."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_kd.data.conversations import REASONING, Chat, Message, text_of_content

_FIRST = 730_520_418_600
"""Numbers from here on stand for what a conversation holds: they are the same in JSON and any case."""


class Coverage:
    """Knows what a template reads of conversations: each place is filled with a number to look for.

    Conversations of the same roles and keys are rendered so once.

    Args:
        render: Renders all of a conversation.
    """

    def __init__(self, render: Callable[[Chat], str]) -> None:
        self._render = render
        self._known: dict[Any, tuple[str | None, bool]] = {}

    def of(self, chat: Chat) -> tuple[str | None, bool]:
        """Return what of a conversation is left out, in words, and whether trained reasoning is.

        A template that refuses numbers in the place of texts is taken to read all.
        """
        messages = [_shape(message) for message in chat.messages]
        shape = (tuple(messages), chat.trained, len(chat.tools or ()))
        if shape not in self._known:
            self._known[shape] = self._looked_for(chat)
        return self._known[shape]

    def _looked_for(self, chat: Chat) -> tuple[str | None, bool]:
        marks = _Marks()
        messages = chat.messages if chat.trained else chat.prompt
        marked = [
            _marked(message, marks, f"message {number}", number - 1 in chat.trained)
            for number, message in enumerate(messages, 1)
        ]
        tools = [_named(tool, marks, "the column 'tools'") for tool in chat.tools or ()]
        try:
            text = self._render(replace(chat, messages=marked, tools=tools or None))
        except Exception:  # a template may demand texts of a kind; the real ones are rendered later
            return None, False
        missing = [what for mark, what in marks.places if mark not in text]
        lost = [what for what in missing if what != REASONING]
        return (lost[0] if lost else None), REASONING in missing


class _Marks:
    """Numbers that have been put into a conversation, and what each stands for."""

    def __init__(self) -> None:
        self.places: list[tuple[str, str]] = []

    def new(self, what: str) -> str:
        mark = str(_FIRST + len(self.places))
        self.places.append((mark, what))
        return mark


def _shape(message: Message) -> tuple[Any, ...]:
    content = message.get("content")
    parts = len(content) if isinstance(content, list) else None
    calls = message.get("tool_calls") or ()
    filled = [name for name, value in message.items() if value]
    blank = not text_of_content(content).strip()
    return message["role"], blank, parts, len(calls), tuple(sorted(filled))


def _marked(message: Message, marks: _Marks, place: str, trained: bool) -> Message:
    """Return a message with numbers in the place of what must be read."""
    role, content, found = message["role"], message.get("content"), dict(message)
    what = f"{place}, of role {role!r}"
    if text_of_content(content).strip():
        found["content"] = (
            [part | {"text": marks.new(what)} if part["text"].strip() else part for part in content]
            if isinstance(content, list)
            else marks.new(what)
        )
    if isinstance(message.get("tool_calls"), list):
        found["tool_calls"] = [
            _named(call, marks, f"tool_calls of {what}") for call in message["tool_calls"]
        ]
    # Of earlier answers many templates leave it out on purpose, as they do with their own thinking.
    if trained and isinstance(message.get(REASONING), str) and message[REASONING].strip():
        found[REASONING] = marks.new(REASONING)
    return found


def _named(given: Any, marks: _Marks, what: str) -> Any:
    """Return a function's schema, or a call of one, with a number for its name."""
    if not isinstance(given, Mapping):
        return given
    if isinstance(given.get("function"), Mapping):
        return {**given, "function": _named(given["function"], marks, what)}
    return {**given, "name": marks.new(what)} if "name" in given else given
