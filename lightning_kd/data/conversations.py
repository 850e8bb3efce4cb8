"""Conversations: what a row holds of messages and tools, and which turns of it are trained on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}

MESSAGES = "messages"
"""Column of a whole conversation, unless another is named."""
SHAREGPT = "conversations"
COLUMNS = ("prompt", "completion", SHAREGPT)
"""Columns that stand for :data:`MESSAGES` where there is none: TRL's, and ShareGPT's."""
SYSTEM = "system"
"""Column with the system message beside ``conversations``, as ShareGPT has it."""
REASONING = "reasoning_content"
"""Key of a message with what the assistant thought."""
TOOLS = "tools"
"""Column with the schemas of functions that the assistant may call."""

TrainOn = Literal["last", "all", "each", "none"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: All of it, the answer at the end included where there is one.
        where: Its place in the files.
        trained: Numbers of the messages that are trained on; none where only a model answers.
        tools: Schemas of functions that the assistant may call.
    """

    messages: Sequence[Message]
    where: str
    trained: tuple[int, ...] = ()
    tools: Sequence[dict[str, Any]] | None = None

    @property
    def prompt(self) -> Sequence[Message]:
        """The messages before the answer; all where there is none."""
        return self.messages[:-1] if self.answer is not None else self.messages

    @property
    def answer(self) -> Message | None:
        """The assistant's message at the end."""
        last = self.messages[-1]
        return last if last["role"] == "assistant" else None


def read_chats(
    columns: dict[str, list[Any]], messages_column: str, places: Sequence[str], train_on: TrainOn
) -> Iterator[tuple[int, Chat]]:
    """Yield the conversations of some rows, each with the number of its row.

    Args:
        columns: JSON of each row's ``messages_column``, or of :data:`COLUMNS`, and of :data:`TOOLS`.
        messages_column: Column of the messages.
        places: The place of each row.
        train_on: Turns of the assistant that are trained on, as in
            :class:`~lightning_kd.data.ChatData`.

    Raises:
        ValueError: If a row holds no conversation, or none with what is to be trained on.
    """
    for row, where in enumerate(places):
        given = {name: json.loads(column[row] or "null") for name, column in columns.items()}
        messages, context = _messages_of(given, messages_column, where)
        tools = _tools_of(given.get(TOOLS), where)
        answers = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
            and number >= max(1, context)
            and message.get("weight") != 0
        ]
        if train_on == "none":
            yield row, _checked(Chat(messages, where, (), tools))
            continue
        if not answers or (train_on == "last" and answers[-1] != len(messages) - 1):
            raise ValueError(f"{where}: {_nothing_to_learn(messages, bool(answers))}")
        if train_on == "each":
            for number in answers:
                place = f"{where}, message {number + 1}" if len(answers) > 1 else where
                yield row, Chat(messages[: number + 1], place, (number,), tools)
        else:
            trained = answers if train_on == "all" else answers[-1:]
            # What follows the last of them changes nothing of it.
            yield row, Chat(messages[: trained[-1] + 1], where, tuple(trained), tools)


def _nothing_to_learn(messages: Sequence[Message], earlier: bool) -> str:
    """Return why a chat has no answer to train on, and what to do."""
    last = messages[-1]
    if last["role"] == "assistant" and last.get("weight") == 0:
        return "the chat's last message has weight 0, so it is not trained on" + (
            ", and no other is"
            if not earlier
            else "; set data.train_on: all or each for those before it"
        )
    return (
        "a chat needs a prompt and, at its end, the assistant's message; this one has "
        f"{len(messages)} messages and ends with the {last['role']}'s. "
        + ("To train on the answers before it, set data.train_on: all or each. " if earlier else "")
        + "For prompts that only a model answers, set data.train_on: none"
    )


def _messages_of(
    given: dict[str, Any], messages_column: str, where: str
) -> tuple[list[Message], int]:
    """Return the messages of a row, and how many of them are a prompt that is never trained on."""
    whole = given.get(messages_column)
    if whole is not None and messages_column != SHAREGPT:
        return _messages(whole, where), 0
    if whole is None and messages_column == MESSAGES:
        whole = given.get(SHAREGPT)
    if whole is not None:
        return _with_system(given.get(SYSTEM), _messages(whole, where), where), 0
    prompt, completion = given.get("prompt"), given.get("completion")
    if messages_column != MESSAGES or prompt is None:
        raise ValueError(
            f"{where}: there is no column {messages_column!r} with a chat"
            + (
                f", and none of {COLUMNS[0]!r} and {COLUMNS[2]!r}"
                if messages_column == MESSAGES
                else ""
            )
            + "; name it with data.messages_column"
        )
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: the prompt is text and no list of messages; read such rows with "
            "PromptCompletionData"
        )
    before = _messages(prompt, where)
    if completion is None:
        return before, len(before)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    after = _messages(completion, where)
    if [message["role"] for message in after] != ["assistant"]:
        raise ValueError(
            f"{where}: the completion must be one message of the assistant, got those of "
            f"{[message['role'] for message in after]}; give the whole conversation in one column "
            f"{MESSAGES!r}, and data.train_on: all"
        )
    return [*before, *after], len(before)


def _with_system(system: Any, messages: list[Message], where: str) -> list[Message]:
    """Return messages behind the column of ShareGPT's system message, if it has one."""
    if not system:
        return messages
    if not isinstance(system, str) or messages[0]["role"] == "system":
        came = "the chat begins with a system message too" if isinstance(system, str) else "no text"
        raise ValueError(
            f"{where}: column {SYSTEM!r} is the system message of {SHAREGPT!r}, and {came}; give it "
            "in one place, as text"
        )
    return [{"role": "system", "content": system}, *messages]


def _messages(given: Any, where: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: a chat is a list of messages, got {given!r:.80}")
    return [_message(message, where) for message in given]


def _message(message: Any, where: str) -> Message:
    """Return a message as templates take it, ShareGPT's in their form."""
    if isinstance(message, dict) and "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(message["from"])
        if role is None:
            raise ValueError(
                f"{where}: unknown speaker {message['from']!r}; ShareGPT's are "
                f"{tuple(_SHAREGPT_ROLES)}. Give others as messages with role and content"
            )
        message = {"role": role, "content": message.get("value")}
    calls = isinstance(message, dict) and bool(message.get("tool_calls"))
    if not isinstance(message, dict) or (message.get("content") is None and not calls):
        raise ValueError(f"{where}: a message needs role and content, got {message!r:.80}")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}: unknown role {message.get('role')!r}; choose one of {ROLES}")
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(
            f"{where}: weight of a message is {message['weight']!r}; it is 1, or 0 where it is not "
            "trained on"
        )
    if message.get("function_call"):
        raise ValueError(f"{where}: function_call is not read; give the call as tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        _check_parts(content, where)
    elif content is not None and not isinstance(content, str):
        raise ValueError(
            f"{where}: a message needs role and content, which is text or a list of parts, got "
            f"{message!r:.80}"
        )
    return message


def _check_parts(parts: list[Any], where: str) -> None:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: a part of a message's content must be {{type: text, text: ...}}, got "
                f"{part!r:.80}; these models read text alone"
            )


def _tools_of(given: Any, where: str) -> list[dict[str, Any]] | None:
    """Return tools, also where they are JSON in a text, as tables of one type have them."""
    if isinstance(given, str):
        try:
            given = json.loads(given or "null")
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: column {TOOLS!r} is not valid JSON: {error.msg}") from error
    if given is not None and not (
        isinstance(given, list) and all(isinstance(tool, dict) for tool in given)
    ):
        raise ValueError(
            f"{where}: column {TOOLS!r} must be a list of schemas of functions, got {given!r:.80}"
        )
    return given or None


def _checked(chat: Chat) -> Chat:
    """Validate that there is something to answer.

    Raises:
        ValueError: If there is not.
    """
    if not chat.prompt:
        raise ValueError(f"{chat.where}: a chat needs a prompt, got one message of the assistant")
    return chat


def text_of_content(content: Any) -> str:
    """Return the text of a message's content: of parts, one after the other.

    Example:
        >>> text_of_content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
        'ab'
    """
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
