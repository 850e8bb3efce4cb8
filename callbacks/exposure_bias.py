"""Exposure bias of a student."""

from collections.abc import Collection

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.batch import PromptBatch
from lightning_kd.callbacks.comparison import Compared
from lightning_kd.callbacks.evaluations import Stage
from lightning_kd.callbacks.own_completions import OwnCompletions
from lightning_kd.callbacks.text_tables import log_table
from lightning_kd.divergences import ForwardKL
from lightning_kd.evaluation.exposure_bias import ExcessError, Writer
from lightning_kd.fused import DivergenceTerm
from lightning_kd.modules import TeacherModule
from lightning_kd.teachers import TEACHERS, check_ability

_ERROR = DivergenceTerm(ForwardKL())


class ExposureBias(OwnCompletions):
    r"""Log how much more the student errs behind its own text than behind its teacher's.

    Student and teacher complete the first ``prompts`` rows of an evaluation, at temperature 1 from
    their whole distributions; the error of a next token is :math:`KL(p \| q)`, with :math:`p` the
    teacher and :math:`q` the student. With :math:`l` = ``max_new_tokens``:

    ==============================  ===========================================================
    ``exposure_bias``               ExAccErr(l), in percent: 0 if the student errs no more behind
                                    its own text, 100 if twice as much
    ``exposure_bias_r``             :math:`R(l)`, the errors behind the student's text, in nats
    ``exposure_bias_epsilon_sum``   :math:`l\,\epsilon(l)`, those behind the teacher's, in nats
    ``exposure_bias_15``            ExAccErr at 15 tokens, for each of ``lengths``
    ==============================  ===========================================================

    See :class:`~lightning_kd.evaluation.ExcessError` for the formulas, for texts that end earlier, and
    for what the official code does differently. The table ``val/exposure_bias_curve`` has every
    length, in each logger that can show one.

    The student's completions are those of :class:`OwnCompletions`, all of whose numbers come with it.
    The teacher must give the whole distribution and generate.

    The other options are those of :class:`OwnCompletions`.

    Args:
        lengths: Further lengths to log, in tokens.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Gu et al., *MiniLLM*, ICLR 2024, Eq. 30 to 32. https://arxiv.org/abs/2306.08543
    """

    def __init__(
        self,
        lengths: list[int] | None = None,
        max_new_tokens: int = 128,
        prompts: int = 64,
        samples_per_prompt: int = 1,
        gamma: int = 4,
        cost_ratio: float | None = None,
        overlap_k: int | None = None,
    ) -> None:
        super().__init__(max_new_tokens, prompts, samples_per_prompt, gamma, cost_ratio, overlap_k)
        self.lengths = lengths or []
        for length in self.lengths:
            if not 1 <= length <= max_new_tokens:
                raise ValueError(
                    f"lengths has {length}; they must be from 1 to max_new_tokens, {max_new_tokens}"
                )
        self._errors = ExcessError(max_new_tokens)
        self._curve: dict[str, Tensor] = {}

    def names(self) -> Collection[str]:
        """Return the names of the comparison, and those of :class:`OwnCompletions`."""
        own = ("exposure_bias", "exposure_bias_r", "exposure_bias_epsilon_sum")
        at = [f"exposure_bias_{length}" for length in self.lengths]
        return [*super().names(), *own, *at]

    @property
    def metrics(self) -> list[Metric]:
        """What is added up over an evaluation."""
        return [*super().metrics, self._errors]

    def check_teacher(self, module: TeacherModule) -> None:
        """Refuse a teacher that cannot be asked, or does not generate.

        Raises:
            ValueError: If it is one.
        """
        super().check_teacher(module)
        check_ability(module.teacher, "generation", "ExposureBias", TEACHERS)

    def add_samples(
        self, module: TeacherModule, batch: PromptBatch, chosen: Tensor, number: int
    ) -> None:
        """Sample a completion of each prompt from both models, and add the errors behind them."""
        own = self.sampled(module, batch, chosen, number, on_policy=True)
        self._add_errors(own, self.add_own(own, [_ERROR])[0], chosen, "student")
        theirs = self.sampled(module, batch, chosen, number, on_policy=False)
        self._add_errors(theirs, theirs.values([_ERROR])[0], chosen, "teacher")

    def values(self) -> dict[str, Tensor]:
        """Return what is logged, by name, computed over all processes."""
        self._curve = self._errors.compute()
        excess = self._curve["excess"]
        at_end = {
            "exposure_bias": excess[-1],
            "exposure_bias_r": self._curve["of_student"][-1],
            "exposure_bias_epsilon_sum": self._curve["of_teacher"][-1],
        }
        at = {f"exposure_bias_{length}": excess[length - 1] for length in self.lengths}
        return super().values() | at_end | at

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Log the means, and the curve as a table."""
        super().end(trainer, module, stage)
        rows = [
            (str(length), *(f"{value:.4g}" for value in values))
            for length, values in enumerate(torch.stack([*self._curve.values()], -1).tolist(), 1)
        ]
        header = (
            "tokens",
            "error behind the student's text",
            "behind the teacher's",
            "excess in %",
        )
        log_table(trainer, f"{stage}/exposure_bias_curve", header, rows, trainer.global_step)

    def _add_errors(self, text: Compared, errors: Tensor, chosen: Tensor, writer: Writer) -> None:
        per_row, rows = text.positions.tokens_per_row, text.positions.rows
        starts = per_row.cumsum(0) - per_row
        places = torch.arange(len(rows), device=rows.device) - starts[rows]
        self._errors.update(errors, places, writer)
