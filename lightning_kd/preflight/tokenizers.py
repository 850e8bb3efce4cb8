"""Facts about tokenizers: ids, special tokens, and what their chat templates render."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_kd.data.conversations import Chat
from lightning_kd.data.rendering import render_chats
from lightning_kd.preflight.facts import TokenizerFacts
from lightning_kd.tokenization import load_tokenizer

_SHORT = Chat(
    [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}],
    "a short chat",
    trained=(1,),
)
_TURNS = [
    *_SHORT.messages,
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "That is all."},
]
_LONGER = Chat(_TURNS, "a longer chat", trained=(3,))
_BRIEFED = Chat(
    [{"role": "system", "content": "Be brief."}, *_TURNS], "a chat with a system message", (4,)
)

_SHOWN = 40
"""Characters around the first difference of two texts."""
_IDS = 4
"""Ids from the first difference on."""


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    data: PreTrainedTokenizerBase,
    texts: Sequence[str],
    roles: frozenset[str],
    framed: bool,
) -> TokenizerFacts:
    """Return what is known of a tokenizer, compared with that of the data.

    Args:
        tokenizer: The tokenizer.
        name: Where it comes from.
        data: That of the data; it may be the same.
        texts: Texts of the data, which both tokenize.
        roles: Who speaks in the data, if it is rendered by its chat template.
        framed: Whether texts of the data begin with what the tokenizer puts there.
    """
    other = tokenizer is not data
    return TokenizerFacts(
        name=name,
        size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=tokenizer.eos_token_id,
        special={
            role: (str(token), tokenizer.convert_tokens_to_ids(str(token)))
            for role, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
        has_template=bool(tokenizer.chat_template),
        other_ids=_other_ids(data, tokenizer, texts) if other else "",
        other_template=_other_template(data, tokenizer, roles) if other and roles else "",
        other_start=_other_start(data, tokenizer) if other and framed else "",
    )


def saved_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer beside a model; None if there is none."""
    if Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(name)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int] | None:
    """Return the special token that a chat template puts behind a turn of the assistant, and its id.

    Returns:
        None if it puts none there, or cannot render a short chat.
    """
    rendered = _rendered(tokenizer, _SHORT)
    if rendered is None:
        return None
    behind = rendered.rpartition("So.")[2]
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    found = [(behind.index(token), token) for token in special if token in behind]
    token = min(found, default=(0, ""))[1]
    return (token, special[token]) if token else None


def _other_ids(
    data: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Sequence[str]
) -> str:
    vocabulary, its = data.get_vocab(), other.get_vocab()
    shared = sorted(vocabulary.keys() & its.keys()) if vocabulary != its else []
    for token in shared:
        if vocabulary[token] != its[token]:
            return f"{token!r} is {vocabulary[token]} in the data's and {its[token]} in this one"
    for text in texts:
        a, b = (
            t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (data, other)
        )
        if a != b:
            shorter = min(len(a), len(b))
            at = next((i for i in range(shorter) if a[i] != b[i]), shorter)
            ours, theirs = a[at : at + _IDS], b[at : at + _IDS]
            return f"{text[:_SHOWN]!r} has {ours} in the data's where this one has {theirs}"
    return ""


def _other_start(data: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    ours, theirs = _start(data), _start(other)
    if ours == theirs:
        return ""
    return f"it begins a text with {theirs or 'nothing'}, and the data's with {ours or 'nothing'}"


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a tokenizer puts before a text, as text."""
    whole, bare = (
        tokenizer("So.", add_special_tokens=added, verbose=False)["input_ids"]
        for added in (True, False)
    )
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return ", ".join(f"{tokenizer.decode([token])!r} ({token})" for token in whole[:at])


def _other_template(
    data: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, roles: frozenset[str]
) -> str:
    if not data.chat_template or not other.chat_template:
        return ""
    if data.chat_template == other.chat_template:
        return ""
    for chat in (_SHORT, _LONGER, *([_BRIEFED] if "system" in roles else [])):
        ours, theirs = _rendered(data, chat), _rendered(other, chat)
        if ours != theirs:
            return (
                f"a short chat is {_around(ours, theirs)} with the data's and "
                f"{_around(theirs, ours)} with this one"
            )
    return ""


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str | None:
    """Return a chat as text; None if the template refuses it."""
    try:
        (rendered,) = render_chats([chat], tokenizer)
    except ValueError:
        return None
    return rendered.text


def _around(text: str | None, other: str | None) -> str:
    """Return the part of a text where it begins to differ from another one."""
    if text is None:
        return "refused"
    differ = [i for i, (a, b) in enumerate(zip(text, other or "", strict=False)) if a != b]
    start = max(0, (differ or [min(len(text), len(other or ""))])[0] - _SHOWN // 2)
    return repr(text[start : start + _SHOWN])
