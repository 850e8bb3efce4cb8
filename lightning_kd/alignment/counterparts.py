"""Special tokens of two tokenizers that mean the same."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from lightning_kd.token_bytes import unknown_tokens

_ROLES = ("eos_token", "bos_token", "sep_token", "cls_token", "pad_token")


def counterparts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Return the teacher's token for each of the student's special tokens that has one.

    It is that of the same role (EOS, BOS, separator, classifier, padding), or else of the same name; of
    the same name first where the teacher's chat template has it, as where that ends turns with another
    token than EOS. An unknown token, which may stand for any text, has none, also if it is padding.

    Raises:
        ValueError: If the bytes of the student's tokens are not known.

    Example:
        >>> from lightning_kd.data import arithmetic_tokenizer
        >>> from lightning_kd.data.tokenizer_training import train_tokenizer
        >>> other = train_tokenizer(["12"], vocab_size=258)
        >>> counterparts(arithmetic_tokenizer(), other), other.pad_token_id, other.eos_token_id
        ({1: 1}, 0, 1)
    """
    theirs = {str(token): number for number, token in _special(teacher).items()}
    unknown = unknown_tokens(student)
    ours = {n: str(token) for n, token in _special(student).items() if n not in unknown}
    named = {number: theirs[name] for number, name in ours.items() if name in theirs}
    found = dict(named)
    for role in reversed(_ROLES):  # what is EOS too is the EOS
        own, other = (getattr(side, f"{role}_id") for side in (student, teacher))
        if own is not None and other is not None and own not in unknown:
            found[own] = other
    template = str(teacher.chat_template or "")
    return found | {number: other for number, other in named.items() if ours[number] in template}


def _special(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, object]:
    added = tokenizer.added_tokens_decoder.items()
    return {n: token for n, token in added if token.special and n != tokenizer.unk_token_id}
