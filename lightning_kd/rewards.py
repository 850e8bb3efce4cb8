"""Rewards of whole completions.

A reward function takes keyword arguments, each a list with one entry per completion: ``prompts``,
``completions``, ``references`` (the data's completions) and every extra column of the data, and
returns one number per completion. It is named by its import path, ``lightning_kd.rewards.exact_match``
or ``my_package.my_reward``; what it does not use, it takes as ``**_``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

RewardFunction = Callable[..., Sequence[float]]
"""``(*, prompts, completions, references, **columns) -> one number per completion``."""

_FINAL_ANSWER = re.compile(r"####\s*(-?[\d.,]+)")


def exact_match(*, completions: list[str], references: list[str], **_: Any) -> list[float]:
    """1 where a completion equals its reference, white space at the ends aside.

    Example:
        >>> exact_match(completions=["2111", "21"], references=["2111", "2111"])
        [1.0, 0.0]
    """
    return [float(c.strip() == r.strip()) for c, r in zip(completions, references, strict=True)]


def final_answer(*, completions: list[str], references: list[str], **_: Any) -> list[float]:
    """1 where the number after the last ``####`` has the value of the reference's, in GSM8K's form.

    More lenient than :class:`~lightning_kd.evaluation.GSM8KAccuracy`, which is how GSM8K is scored.

    Raises:
        ValueError: If a reference has no final answer.

    Example:
        >>> final_answer(completions=["so #### 1,200.", "#### 3"], references=["#### 1200", "#### 4"])
        [1.0, 0.0]
    """
    return [
        float(_answer(completion) == _required_answer(reference))
        for completion, reference in zip(completions, references, strict=True)
    ]


def _answer(text: str) -> float | None:
    found = _FINAL_ANSWER.findall(text)
    try:
        return float(found[-1].replace(",", "").rstrip(".")) if found else None
    except ValueError:
        return None  # what a student writes may look like 1.2.3


def _required_answer(reference: str) -> float:
    answer = _answer(reference)
    if answer is None:
        raise ValueError(
            f"the reference {reference!r:.80} has no final answer ('#### 42'); final_answer is for "
            "data written as GSM8K is"
        )
    return answer
