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
        l\,\epsilon(l) = \sum_{t \le l} E_{y \sim p}[e_t], \qquad
        \mathrm{ExAccErr}(l) = \frac{R(l) - l\,\epsilon(l)}{l\,\epsilon(l)} \cdot 100\,\%

    MiniLLM, Eq. 30 to 32. The equations are of texts that go on. Here a text has no next token behind
    its end, which is no error of 0: :math:`E[e_t]` is the mean over the texts that have a token
    :math:`t` (their EOS included), whatever share of the texts that is. So a student that ends
    earlier than its teacher, or later, is not made better or worse by that. A :math:`t` that no text
    of one of the two reaches is in neither sum. :math:`R` and :math:`l\,\epsilon` are as good as the
    texts at each :math:`t` are many.

    The official code (evaluate_exposure_bias.py) differs: it leaves out the first token of the
    completion, adds 0.001 to the number of texts that are left in the mean of each position, counts
    a position without any as 0, divides the standard deviation of the teacher's texts by itself, and
    prints :math:`l = 15` alone.

    Args:
        length: Positions.

    Example:
        >>> metric = ExcessError(2)
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), "student")
        >>> metric.update(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 1, 0]), "teacher")
        >>> metric.compute()["excess"]
        tensor([ 0., 50.], dtype=torch.float64)

    References:
        Gu et al., *MiniLLM*, ICLR 2024, section 3.3 and appendix. https://arxiv.org/abs/2306.08543
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        zeros = torch.zeros(2, length, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, errors: Tensor, places: Tensor, writer: Writer) -> None:
        """Add texts.

        Args:
            errors: KL from the teacher to the student at each token, ``(N,)``.
            places: Of each token in its completion, from 0, ``(N,)``.
            writer: Whose texts they are.
        """
        row = _WRITERS.index(writer)
        values = errors.to(self.sums.dtype)
        added, count = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        added[row].index_add_(0, places, values)
        count[row].index_add_(0, places, torch.ones_like(values))
        self.sums = self.sums + added
        self.counts = self.counts + count

    def compute(self) -> dict[str, Tensor]:
        r"""Return, for each l, ``of_student``, ``of_teacher`` and ``excess``.

        :math:`R(l)`, :math:`l\,\epsilon(l)` and ExAccErr in percent, ``(L,)`` each.
        NaN where there are no texts or no errors.
        """
        reached = (self.counts > 0).all(0)
        means = torch.where(reached, self.sums / self.counts.clamp(min=1), 0.0)
        of_student, of_teacher = means.cumsum(-1).masked_fill(~reached[0], torch.nan)
        excess = (of_student - of_teacher) / of_teacher * 100
        return {"of_student": of_student, "of_teacher": of_teacher, "excess": excess}
