"""From conversations to tokens, by the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.data.conversations import Chat, text_of_content
from lightning_kd.data.encoding import Encoded, end_with_eos
from lightning_kd.data.rendering import render_chats
from lightning_kd.data.turns import RenderedChat
from lightning_kd.tokenization import tokens_of

CHANGED = (
    "have an answer that the chat template changes, and what is trained on is what it makes of it"
)
UNREAD = (
    "have reasoning_content in an answer that is trained on, and the chat template leaves it out, so "
    "that nothing is learned of it"
)
EMPTY = "have an answer without a word, of which its end alone is trained on"
NO_END_WITHIN = (
    "have answers before the last one that end without an EOS, so that nothing learns to end there"
)
OTHER_END = (
    "end with {end}, which the chat template puts there, and not with {eos}, the EOS, which "
    "is appended and trained on too. data.eos_token: '{end}' ends completions there"
)


def encode_chats(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Return tokens and texts of prompts and answers, and which tokens are trained on.

    A turn that is trained on is trained up to its first EOS, that included; what the template puts
    behind it (a line break) is not. The row ends with its last turn's EOS, which is appended where
    the template renders none.

    Args:
        chats: The conversations.
        tokenizer: Has the template, and an EOS.
        arguments: Further variables of the template.

    Raises:
        ValueError: If the template refuses a conversation, renders it so that its turns cannot be told
            apart, takes too long or writes too much.
    """
    rendered = render_chats(chats, tokenizer, arguments)
    whole = tokens_of([chat.text for chat in rendered], tokenizer)
    return [
        _encoded(chat, text, ids, tokenizer)
        for chat, text, ids in zip(chats, rendered, whole, strict=True)
    ]


def encode_chat_prompts(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the tokens of conversations that a model is to answer; see :func:`encode_chats`."""
    return tokens_of([chat.text for chat in render_chats(chats, tokenizer, arguments)], tokenizer)


def _encoded(
    chat: Chat, rendered: RenderedChat, whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    reference = text_of_content((chat.answer or {}).get("content"))
    prompt_text = rendered.text[: rendered.prompt]
    if not chat.trained:
        references = None if chat.answer is not None else ()
        return Encoded(whole, [], prompt_text, reference, references=references)
    last = rendered.spans[-1]
    cuts = sorted({0, rendered.prompt, *(cut for span in rendered.spans for cut in span)})
    cuts += [last[1]] if last[0] == last[1] else []  # an empty answer, which only ends
    pieces = pieces_of_tokens(rendered.text, whole, cuts, tokenizer)
    joined = [token for ids in pieces for token in ids]
    prompt: list[int] = []
    completion: list[int] = []
    trained: list[bool] = []
    behind, ends, empty = "", 0, False
    for span, ids in zip(pairwise(cuts), pieces, strict=True):
        learned = 0
        if span in rendered.spans:
            ended = end_with_eos(ids, tokenizer, ended=span == last)
            learned, behind = len(ended.ids), behind or ended.after_eos
            ends += span != last and ended.ids[-1:] == [tokenizer.eos_token_id]
            empty |= list(ended.ids) in ([], [tokenizer.eos_token_id])
            ids = ended.ids if span == last else ids
        (prompt if span[1] <= rendered.prompt and span != last else completion).extend(ids)
        trained += [number < learned for number in range(len(ids))]
    remarks = [CHANGED] if rendered.changed else []
    remarks += [UNREAD] if rendered.unread else []
    remarks += [EMPTY] if empty else []
    remarks += [NO_END_WITHIN] if ends < len(chat.trained) - 1 else []
    remarks += _other_end(pieces[-1], tokenizer)
    return Encoded(
        prompt,
        completion,
        prompt_text,
        reference,
        behind,
        tuple(trained),
        tuple(remarks),
        tokenized_apart=joined != whole[: len(joined)],
    )


def _other_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what to say of an answer that the template ends with a special token that is no EOS."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [number for number, token in enumerate(ids) if token in special]
    if tokenizer.eos_token_id in ids or not ends:
        return []
    if tokenizer.decode(ids[ends[-1] + 1 :]).strip():
        return []
    end = tokenizer.convert_ids_to_tokens(ids[ends[-1]])
    return [OTHER_END.format(end=end, eos=tokenizer.eos_token)]


def pieces_of_tokens(
    text: str, whole: list[int], cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the tokens of each piece of a text.

    They are those of the whole text where every cut falls between two tokens and what is before it
    has the same tokens alone, as a prompt has when a model answers it. Otherwise each piece is
    tokenized by itself, as generation would go on from there.

    Args:
        text: All of it.
        whole: Its tokens.
        cuts: Characters where pieces begin and end, the first and the last included.
        tokenizer: Made the tokens.
    """
    spans = list(pairwise(cuts))
    apart = tokens_of([text[start:end] for start, end in spans], tokenizer)
    kept = text[: cuts[-1]]
    if kept != text:  # a template's last words, which nobody trains on
        (whole,) = tokens_of([kept], tokenizer)
    if [token for ids in apart for token in ids] == whole or not tokenizer.is_fast:
        return apart
    offsets = tokenizer(kept, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    bounds = [sum(start < cut for start, _ in offsets) for cut in cuts]
    before = tokens_of([text[:cut] for cut in cuts[1:]], tokenizer)
    if any(ids != whole[:bound] for ids, bound in zip(before, bounds[1:], strict=True)):
        return apart
    return [whole[start:end] for start, end in pairwise(bounds)]
