"""From a row to tokens: what is prompt, and what is completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.tokenization import begun, special_token_frame, tokens_of


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
    teacher_prompt: Sequence[int] | None = None
    """Tokens that the teacher reads in place of the prompt; None where it reads the prompt."""


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
    teacher_prompt: list[int] | None = None
    """Tokens that the teacher reads in place of the prompt; None where it reads the prompt."""


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
