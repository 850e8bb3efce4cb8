"""Validation that student, teacher and data have the same tokens, before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.strategies import shape_of
from lightning_kd.tokenization import load_tokenizer

VocabularyPolicy = Literal["equal", "shared"]
"""``equal``: logits of one width, or an error. ``shared``: both are cut to the narrower width before
the softmax, which is right where the ids agree and the surplus is padding (Qwen's 151,936 against
152,064). Nothing is ever resized or filled up."""


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the width of a model's logits."""
    head = model.get_output_embeddings()
    text = model.config.get_text_config()  # a composite configuration has no vocabulary itself
    return int(text.vocab_size if head is None else shape_of(head.weight)[0])


def check_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, role: str) -> None:
    """Validate that every id of the tokenizer has a row in the model.

    Raises:
        ValueError: If the tokenizer knows more ids than the model.
    """
    largest, size = max(tokenizer.get_vocab().values()), vocabulary_size(model)
    if largest >= size:
        raise ValueError(
            f"the tokenizer gives ids up to {largest}, but the {role} has {size} logits: use the "
            f"tokenizer that belongs to the {role}"
        )


def check_tokenizers(
    tokenizer: PreTrainedTokenizerBase, directory: str, role: str, policy: VocabularyPolicy
) -> None:
    """Compare the data's tokenizer with the one saved beside a model, if there is one.

    Raises:
        ValueError: If the same id stands for different tokens, or if one side lacks tokens and the
            policy is ``equal``.
    """
    if Path(directory).is_dir() and not (Path(directory) / "tokenizer_config.json").exists():
        return  # A directory of weights alone is common; the sizes are still compared.
    other = load_tokenizer(directory)
    compare_vocabularies(tokenizer.get_vocab(), other.get_vocab(), directory, role, policy)


def compare_vocabularies(
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
    place: str,
    role: str,
    policy: VocabularyPolicy,
) -> None:
    """Compare the data's tokens with those of another model.

    Args:
        ours: Ids of the data's tokens.
        theirs: Ids of the model's.
        place: Where the model is.
        role: Its name.
        policy: Whether one side may have further tokens.

    Raises:
        ValueError: If the same id stands for different tokens, or if one side lacks tokens and the
            policy is ``equal``.
    """
    different = [t for t in sorted(ours.keys() & theirs.keys()) if ours[t] != theirs[t]]
    surplus = len(ours.keys() ^ theirs.keys())
    if different or (surplus and policy == "equal"):
        example = (
            f"{different[0]!r} is {ours[different[0]]} in the data and {theirs[different[0]]} in "
            f"the {role}"
            if different
            else f"{surplus} tokens are in one of them only ({len(ours)} and {len(theirs)} tokens)"
        )
        raise ValueError(
            f"tokenizer mismatch: the data and the {role} {place!r} give different ids: "
            f"{example}. Distillation compares distributions over the same tokens: use the "
            f"{role}'s tokenizer for the data, or a {role} that was trained with it"
        )


def shared_vocabulary(student_size: int, teacher_size: int, policy: VocabularyPolicy) -> int:
    """Return the width at which two distributions are compared.

    Raises:
        ValueError: If the sizes differ and the policy is ``equal``.

    Example:
        >>> shared_vocabulary(151_936, 152_064, "shared")
        151936
    """
    if student_size != teacher_size and policy == "equal":
        raise ValueError(
            f"vocabulary mismatch: the student has {student_size} logits, the teacher "
            f"{teacher_size}. If their ids agree and the surplus is padding, set "
            "vocabulary: shared, which compares the first "
            f"{min(student_size, teacher_size)} and logs the mass it leaves out; otherwise choose "
            "models with one vocabulary"
        )
    return min(student_size, teacher_size)
