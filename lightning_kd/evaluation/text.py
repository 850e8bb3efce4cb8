"""Metrics of completions against references: equality, and overlap of words."""

from collections.abc import Sequence

from torchmetrics.functional.text import rouge_score

from lightning_kd.evaluation.completion_metric import MeanScore


class ExactMatch(MeanScore):
    """Share of completions that equal one of their references, white space at the ends aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["975", "12 "], [["975"], ["13", "twelve"]])
        >>> metric.compute()["exact_match"].item()
        0.5
    """

    names = ("exact_match",)

    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """1 for a match."""
        return [float(completion.strip() in {text.strip() for text in references})]


class RougeL(MeanScore):
    r"""Mean over completions of the ROUGE-L F1 with the best of their references, in [0, 1].

    .. math:: F = \frac{2 P R}{P + R}, \qquad P = \frac{\mathrm{LCS}(c, r)}{|c|}, \quad
        R = \frac{\mathrm{LCS}(c, r)}{|r|}

    over words of letters a to z and digits, in lower case, with LCS the length of the longest common
    subsequence; torchmetrics computes it as the package ``rouge_score`` does for ``rougeL``. Papers
    give it times 100; MiniLLM's uses the stemmer.

    Args:
        use_stemmer: Whether words of four letters or more are compared by their stems (Porter's),
            for which ``nltk`` must be installed; it loads nothing from the network.

    Raises:
        ValueError: If ``nltk`` is needed and not installed.

    References:
        Lin, *ROUGE: A Package for Automatic Evaluation of Summaries*, 2004.
        https://aclanthology.org/W04-1013/

    Example:
        >>> metric = RougeL()
        >>> metric.update(["the cat sat"], [["a dog", "the cat had sat down"]])
        >>> round(metric.compute()["rouge_l"].item(), 3)  # 3 of 3 words, and 3 of 5
        0.75
    """

    names = ("rouge_l",)

    def __init__(self, use_stemmer: bool = False) -> None:
        super().__init__()
        self.use_stemmer = use_stemmer
        if use_stemmer:
            try:
                self._f1("words", ["words"])
            except ModuleNotFoundError as error:
                raise ValueError(
                    "use_stemmer needs nltk, which is not installed: pip install nltk"
                ) from error

    def scores(self, completion: str, references: Sequence[str]) -> Sequence[float]:
        """The F1 with the best reference."""
        return [self._f1(completion, references)]

    def _f1(self, completion: str, references: Sequence[str]) -> float:
        found = rouge_score(
            [completion],
            [list(references)],
            accumulate="best",
            use_stemmer=self.use_stemmer,
            rouge_keys="rougeL",
        )
        return found["rougeL_fmeasure"].item()
