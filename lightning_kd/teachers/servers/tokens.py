"""Whether a server has the tokens of a run."""

from collections.abc import Iterator, Sequence
from math import ceil

from transformers import PreTrainedTokenizerBase

from lightning_kd.models.vocabulary import VocabularyPolicy, compare_vocabularies
from lightning_kd.teachers.servers.backend import Ask, Backend, Description
from lightning_kd.tokenization import vocabulary_digest
from lightning_kd.wire import WireError

_TEXT = 'The quick brown fox: 3 + 14 = 17, naïve café, "quoted"\n\tdef f(x): return x  # ß\n'
"""Has letters, digits, accents, blanks and code: other tokenizers cut it elsewhere."""

_LONGEST = 48
"""Tokens of the text that are sent as a row."""


def same_tokens(
    url: str,
    backend: Backend,
    ask: Ask,
    tokenizer: PreTrainedTokenizerBase,
    description: Description,
    policy: VocabularyPolicy,
) -> list[int]:
    """Return the ids of a text, where both sides have the same ids for the same tokens.

    A server of this library tells its vocabulary. Others are asked for the ids of texts that hold the
    run's tokens, as many as :attr:`Backend.probe` allows.

    Args:
        url: The server's.
        backend: Speaks to it.
        ask: Sends a request to it.
        tokenizer: The run's.
        description: What it says of itself.
        policy: Whether one side may have further tokens.

    Raises:
        WireError: If they have not; it names a token.
    """
    if description.vocabulary is None:
        for text in texts_over_vocabulary(tokenizer, *_bounded(backend, description)):
            _same_ids(url, backend, ask, tokenizer, text)
    elif description.vocabulary != vocabulary_digest(tokenizer):
        theirs = backend.vocabulary(ask)
        try:
            compare_vocabularies(tokenizer.get_vocab(), theirs, url, "teacher", policy)
        except ValueError as error:
            raise WireError(str(error)) from error
    return _same_ids(url, backend, ask, tokenizer, _TEXT)[:_LONGEST]


def texts_over_vocabulary(
    tokenizer: PreTrainedTokenizerBase, tokens: int, texts: int
) -> Iterator[str]:
    """Yield texts that hold the tokens of a vocabulary, each behind a blank and behind a line's end.

    Special tokens are left out, and those that are parts of a character.

    Args:
        tokenizer: Of the vocabulary.
        tokens: Tokens of each text.
        texts: Texts at most; where they are too few for all tokens, every n-th is taken.
    """
    special = set(tokenizer.all_special_ids)
    ids = [[i] for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    ids = ids[:: max(1, ceil(len(ids) / (tokens * texts)))]
    for start in range(0, len(ids), tokens):
        pieces = tokenizer.batch_decode(ids[start : start + tokens])
        pieces = [piece for piece in pieces if piece.strip() and "\ufffd" not in piece]
        if pieces:
            yield f"{' '.join(pieces)}\n" + "\n".join(pieces)


def _bounded(backend: Backend, description: Description) -> tuple[int, int]:
    tokens, texts = backend.probe
    if description.length is None:
        return tokens, texts
    # A piece may take several tokens where it stands alone.
    return max(1, min(tokens, description.length // 8)), texts


def _same_ids(
    url: str, backend: Backend, ask: Ask, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[int]:
    """Return the ids of a text, which both sides must have."""
    special = backend.adds_special_tokens
    ours = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    theirs = backend.token_ids(ask, text)
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise WireError(
            f"tokenizer mismatch: for one text the data has {len(ours)} tokens and {url} "
            f"{len(theirs)}; from token {place} on they are {_shown(tokenizer, ours[place:])} and "
            f"{theirs[place : place + 4]}. Use the teacher's tokenizer for the data"
        )
    return ours


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    first = list(ids[:4])
    return f"{first} ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(first)))})"
