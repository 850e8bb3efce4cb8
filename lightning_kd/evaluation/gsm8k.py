"""Accuracy on GSM8K."""

import re
from collections.abc import Sequence

from lightning_kd.evaluation.completion_metric import MeanScore

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class GSM8KAccuracy(MeanScore):
    """Share of completions with the right number, as lm-eval's ``gsm8k`` finds it.

    ``gsm8k_accuracy_strict`` takes the number behind the first ``####``, as the data is written and
    OpenAI's own script reads it, of completions and of references (where lm-eval reads the last; each
    of GSM8K's own has one), and ``gsm8k_accuracy_flexible`` the last number anywhere. Numbers
    are compared as they are written, without commas, dollar signs and a full stop at the end: 72.0
    is not 72. Calculator annotations (``<<48/2=24>>24``) stay in the text, where the number that they
    end with follows once more.

    Raises:
        ValueError: If no reference of a completion ends with ``#### 42``.

    References:
        Cobbe et al., *Training Verifiers to Solve Math Word Problems*, 2021.
        https://arxiv.org/abs/2110.14168

    Example:
        >>> metric = GSM8KAccuracy()
        >>> references = [["48/2 = <<48/2=24>>24 ... #### 1,072"]] * 3
        >>> metric.update(["so #### 1072.", "It is $1,072.", "#### 24 or 1072"], references)
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'gsm8k_accuracy_strict': 0.33, 'gsm8k_accuracy_flexible': 1.0}
    """

    names = ("gsm8k_accuracy_strict", "gsm8k_accuracy_flexible")

    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """1 where the number is right: by the strict rule, and by the flexible one."""
        wanted = {_required(text) for text in references}
        return [float(rule(completion) in wanted) for rule in (strict_answer, flexible_answer)]

    def check_references(self, references: Sequence[Sequence[str]]) -> None:
        """Refuse references without a final answer."""
        super().check_references(references)
        for texts in references:
            for text in texts:
                _required(text)


def strict_answer(text: str) -> str | None:
    """Return the number behind the first ``####``; None where there is none.

    Example:
        >>> strict_answer("#### 1,200. Then #### 3"), strict_answer("1200")
        ('1200', None)
    """
    found = _STRICT.search(text)
    return None if found is None else _plain(found[1])


def flexible_answer(text: str) -> str | None:
    """Return the last number of a text; None where there is none.

    Example:
        >>> flexible_answer("5 <<5*2=10>>10 dollars"), flexible_answer("it costs $1,200.")
        ('10', '1200')
    """
    found = _FLEXIBLE.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")


def _required(reference: str) -> str:
    answer = strict_answer(reference)
    if answer is None:
        raise ValueError(
            f"GSM8KAccuracy reads the number behind '####' in a reference, and {reference!r:.80} has "
            "none ('#### 42'); use it with data written as GSM8K is"
        )
    return answer
