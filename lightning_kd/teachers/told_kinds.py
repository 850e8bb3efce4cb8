"""Options of this library's teachers that decide which kinds of answers they give."""

from collections.abc import Mapping, Sequence

from lightning_kd.fused import AnswerKind

_OPTIONS = {"ServedTeacher": "payload", "CachedTeacher": "a cache of --cache.kind"}

_TOLD_BY: Mapping[AnswerKind, str] = {
    "full_distribution": "hidden",
    "top_k": "top_k",
    "top_k_and_token": "top_k",
    "sampled": "sampled",
    "token_log_probs": "token_log_probs",
}
"""Values of these options."""


def how_it_could(name: str, needs: Sequence[AnswerKind]) -> str:
    """Return with which option a class of teachers gives one of some kinds; empty where none does.

    Example:
        >>> how_it_could("ServedTeacher", ["full_distribution"])
        ' (a ServedTeacher with payload: hidden)'
        >>> how_it_could("TopKTeacher", ["full_distribution"])
        ''
    """
    if name not in _OPTIONS:
        return ""
    values = " or ".join(dict.fromkeys(_TOLD_BY[kind] for kind in needs if kind in _TOLD_BY))
    return f" (a {name} with {_OPTIONS[name]}: {values})"
