"""Exposure bias: how much more a student errs behind its own text than behind its teacher's."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Writer = Literal["student", "teacher"]
_WRITERS: tuple[Writer, Writer] = ("student", "teacher")


class ExcessError(Metric):
    r"""Excess accumulated error (ExAccErr) of a student, at every length.

    With student :math:`q`, teacher :math:`p` and the error :math:`e_t = KL(p \| q)` of the next token
    behind :math:`y_{<t}`, over the whole vocabulary:

    .. math::
        R(l) = \sum_{t \le l} E_{y \sim q}[e_t], \qquad
        \epsilon(l) = \frac{1}{l} \sum_{t \le l} E_{y \sim p}[e_t], \qquad
        \mathrm{ExAccErr}(l) = \frac{R(l) - l\,\epsilon(l)}{l\,\epsilon(l)} \cdot 100\,\%

    MiniLLM, Eq. 30 to 32. Behind its end a text has no error left: both models give an ended text
    nothing to say. :math:`R` and :math:`l\,\epsilon` are unbiased, their ratio is as good as
    the samples are many.

    The official code (evaluate_exposure_bias.py) differs: it leaves out the first token of the
    completion, adds 0.001 to the number of texts that are left in the mean of each position, divides
    the standard deviation of the teacher's texts by itself, and prints :math:`l = 15` alone.

    Args:
        length: Positions.

    Example:
        >>> metric = ExcessError(2)
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), 1, "student")
        >>> metric.update(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 1, 0]), 2, "teacher")
        >>> metric.compute()["excess"]
        tensor([  0., 100.], dtype=torch.float64)

    References:
        Gu et al., *MiniLLM*, ICLR 2024, section 3.3 and appendix. https://arxiv.org/abs/2306.08543
    """

    full_state_update = False
    sums: Tensor
    texts: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        zeros = torch.zeros(2, length, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("texts", zeros[:, 0].clone(), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, errors: Tensor, places: Tensor, texts: int, writer: Writer) -> None:
        """Add texts.

        Args:
            errors: KL from the teacher to the student at each token, ``(N,)``.
            places: Of each token in its completion, from 0, ``(N,)``.
            texts: How many they are.
            writer: Whose they are.
        """
        row = _WRITERS.index(writer)
        added = torch.zeros_like(self.sums)
        added[row].index_add_(0, places, errors.to(added.dtype))
        self.sums = self.sums + added
        count = torch.zeros_like(self.texts)
        count[row] = texts
        self.texts = self.texts + count

    def compute(self) -> dict[str, Tensor]:
        r"""Return, for each l, ``of_student``, ``of_teacher`` and ``excess``.

        :math:`R(l)`, :math:`l\,\epsilon(l)` and ExAccErr in percent, ``(L,)`` each.
        NaN where there are no texts or no errors.
        """
        means = self.sums / self.texts[:, None]
        of_student, of_teacher = means.cumsum(-1)
        excess = (of_student - of_teacher) / of_teacher * 100
        return {"of_student": of_student, "of_teacher": of_teacher, "excess": excess}
