"""Diagnostics of the normalization of a loss."""

from collections.abc import Sequence
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.callbacks.audit.step_audit import StepAudit
from lightning_kd.callbacks.metric_logging import log_metrics
from lightning_kd.divergences.log_space import weighted
from lightning_kd.modules import DistillationModule
from lightning_kd.modules.loss import EvaluatedTerm
from lightning_kd.normalization import ConstantLength

_FIELDS = (
    "count",
    "tokens",
    "sequences",
    "weighted_sum",
    "token_sum",
    "sequence_sum",
    "weight_min",
    "weight_max",
    "real_tokens",
    "padded_tokens",
    "own_sum",
    "disagreements",
)
_COLUMN = {name: column for column, name in enumerate(_FIELDS)}
_TERM_FIELDS = ("weight", "tokens")


class LossNormalizationDiagnostics(Callback):
    r"""Log, under ``norm/``, how the loss of an optimizer step was normalized.

    ==========================  ===============================================================
    ``count``                   divisor of the step's loss, over all ranks and micro-batches
    ``tokens``, ``sequences``   number of scored tokens, and of rows with any
    ``loss_token`` ...          loss under each normalization (under `constant` if it is the
                                module's, which knows the length); a term with a normalization of
                                its own keeps it
    ``sequence_over_token``     ratio of the two losses
    ``weight_min``, ``_max``    effective weight of a token in the loss
    ``padding_share``           share of padding in the batch
    ``length_loss_covariance``  covariance over rows of length and mean loss
    ``count_min``, ``_max``     spread of the count over ranks and micro-batches
    ``mean_of_means_error``     relative error of the loss if each micro-batch were divided by its
                                own count and the means averaged
    ``<term>/weight``           total effective weight of a term: its coefficient, for a plain mean
    ``<term>/denominator``      effective divisor of its plain sum over its own tokens; not logged
                                for a term with coefficient 0
    ``terms_agree``             1 if all terms are over the same tokens and divided alike
    ==========================  ===============================================================

    Token and sequence normalization differ exactly by the covariance of length and loss:

    .. math:: L_{token} = L_{sequence} + \mathrm{Cov}(n, \bar\ell) / \bar n

    with :math:`n` the length of a row and :math:`\bar\ell` its mean loss. For a policy gradient at
    its first iteration, with advantages that are centered in each group, :math:`\bar\ell = -A`: the
    sequence loss is 0 and the token loss is :math:`-\mathrm{Cov}(n, A)/\bar n`. A logged loss of 0 is
    then correct.

    This works with every method of the library, on steps that are logged.

    **Audit.** With ``audit`` it also recomputes the gradient of a step just taken, from the same
    samples in other partitionings (all in one micro-batch, one by one, in reversed order, with more
    padding, once more in another order with other random numbers; over ranks and in one process), and
    logs the relative differences as ``norm/audit/<partitioning>``. Any module with automatic
    optimization can be audited, including your own: its training step and its hooks up to
    ``configure_gradient_clipping`` are called as Lightning calls them. Above the tolerance it warns or
    raises, and names the cause if it can be identified; `docs/normalization.md` has a table of faults
    that are found. If only single samples differ, the gradient was correct as trained, and an
    information message says so. An audited run gives the same results bit for bit as one without; a
    module with state that cannot be restored (an iterator, an open file) is not audited, with a
    warning. The audit needs memory for the step's samples in one micro-batch, one copy of the module
    and a few gradients.

    Args:
        histograms_every: Optimizer steps between histograms of length and loss of the first rank's
            rows; 0 for none.
        audit: ``never``, ``first`` (the first step of the run) or a number of optimizer steps.
        tolerance: Relative difference of gradients above which a step is at fault. Rounding alone
            gives about 1e-6 in float32 and 1e-2 in bfloat16. Defaults to 1e-3, and to 0.05 if
            anything is computed in 16 bits.
        on_fault: ``warn`` or ``raise``, for a fault and for a step that cannot be audited.

    Raises:
        ValueError: If a value is out of its range; in a run, if a fault is found, or a step cannot be
            audited, and ``on_fault`` is ``raise``.
    """

    def __init__(
        self,
        histograms_every: int = 100,
        audit: Literal["never", "first"] | int = "never",
        tolerance: float | None = None,
        on_fault: Literal["warn", "raise"] = "warn",
    ) -> None:
        if histograms_every < 0:
            raise ValueError(f"histograms_every is {histograms_every}; it must be 0 or more")
        self.histograms_every = histograms_every
        self.audit = StepAudit(audit, tolerance, on_fault)
        self._records: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate that the module can be audited, and warn if there will be nothing to log.

        Raises:
            ValueError: If the gradients of this run cannot be audited.
        """
        self._records, self._rows = [], []
        if self.audit.when != "never":
            self.audit.check(trainer, pl_module)
        elif not isinstance(pl_module, DistillationModule):
            rank_zero_warn(
                "LossNormalizationDiagnostics logs nothing under norm/ for "
                f"{type(pl_module).__name__}: only methods of lightning_kd report their divisor. "
                "Set audit: first (or a number of steps) to check the gradients of any module"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Record the micro-batch; after an optimizer step, aggregate and log."""
        stepped = trainer.global_step != self._steps_before
        step = trainer.global_step if stepped else trainer.global_step + 1
        if isinstance(pl_module, DistillationModule) and self._is_due(trainer, step):
            self._record(pl_module, batch)
            if stepped:
                self._log(trainer, pl_module, step)
        self.audit.after_batch(trainer, pl_module, stepped, outputs, batch, batch_idx)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the number of steps, to tell whether this micro-batch completes one."""
        self._steps_before = trainer.global_step
        self.audit.before_batch(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop recording batches."""
        self.audit.stop()

    def _is_due(self, trainer: L.Trainer, step: int) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (every > 0 and step % every == 0) or self._wants_histogram(step)

    def _wants_histogram(self, step: int) -> bool:
        return self.histograms_every > 0 and step % self.histograms_every == 0

    def _record(self, module: DistillationModule, batch: Batch) -> None:
        lengths = module.micro_batch_loss.positions.tokens_per_row
        losses = module.micro_batch_loss.row_losses()
        weights = module.normalization.row_weights(lengths)
        scored = lengths > 0
        some = weights[scored] if scored.any() else weights.new_tensor([torch.nan])
        means = losses / lengths.clamp(min=1)
        terms = module.micro_batch_loss.terms
        with_own = [term for term in terms.values() if term.has_own_normalization]
        own = [weighted(term.coefficient * term.count_ratio, term.sums()[0]) for term in with_own]
        of_terms = [
            value
            for name in module.terms
            for value in (_weight(terms[name]), terms[name].positions.tokens_per_row.sum())
        ]
        record = [
            module.normalization.count(lengths),
            lengths.sum(),
            scored.sum(),
            (weights * losses).sum(),
            losses.sum(),
            (means * scored).sum(),
            some.min(),
            some.max(),
            batch["attention_mask"].sum(),
            torch.tensor(batch["attention_mask"].numel(), device=lengths.device),
            torch.stack(own).sum() if own else losses.new_zeros(()),
            torch.tensor(not _agree(list(terms.values())), device=lengths.device),
            *of_terms,
        ]
        self._records.append(torch.stack([value.double() for value in record]))
        self._rows.append((lengths[scored], means[scored]))

    def _log(self, trainer: L.Trainer, module: DistillationModule, step: int) -> None:
        # Every rank has the same number of micro-batches: one gather of a few numbers.
        window = torch.stack(self._records)
        gathered = module.all_gather(window)
        assert isinstance(gathered, Tensor)  # as its input
        logs = window_statistics(gathered.reshape(-1, window.shape[1]), module)
        log_metrics(trainer, {f"norm/{name}": value for name, value in logs.items()}, step - 1)
        if self._wants_histogram(step):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    for index, name in enumerate(("completion_length", "sequence_loss")):
                        values = torch.cat([row[index] for row in self._rows])
                        if len(values):
                            logger.experiment.add_histogram(f"norm/{name}", values, step - 1)
        self._records, self._rows = [], []


def _weight(term: EvaluatedTerm) -> Tensor:
    """Return the total weight of the term's tokens before the division, without its coefficient."""
    return (term.count_ratio * term.row_weights * term.positions.tokens_per_row).sum()


def _agree(terms: Sequence[EvaluatedTerm]) -> bool:
    """Return whether all terms of the loss give the same tokens the same weights."""
    first, *others = [term for term in terms if term.coefficient != 0] or [terms[0]]
    return all(
        torch.equal(term.positions.mask, first.positions.mask)
        and torch.allclose(
            term.count_ratio * term.row_weights, first.count_ratio * first.row_weights
        )
        for term in others
    )


def window_statistics(records: Tensor, module: DistillationModule) -> dict[str, Tensor]:
    """Compute the metrics of one optimizer step from a row of numbers per micro-batch and rank."""
    total = {name: records[:, column].sum() for name, column in _COLUMN.items()}
    count, tokens, sequences = (
        total[name].clamp(min=1) for name in ("count", "tokens", "sequences")
    )
    counts = records[:, _COLUMN["count"]]
    sums = records[:, _COLUMN["weighted_sum"]]
    own = total["own_sum"] / count
    loss = total["weighted_sum"] / count + own
    mean_of_means = (sums / counts.clamp(min=1)).mean() + own
    by_token, by_sequence = total["token_sum"] / tokens, total["sequence_sum"] / sequences
    by_batch = total["token_sum"] / sequences
    mean_length = tokens / sequences
    logs = {
        "count": total["count"],
        "tokens": total["tokens"],
        "sequences": total["sequences"],
        "loss_token": by_token + own,
        "loss_sequence": by_sequence + own,
        "loss_batch": by_batch + own,
        "sequence_over_token": (by_sequence + own) / (by_token + own),
        "weight_min": records[:, _COLUMN["weight_min"]].nan_to_num(torch.inf).min() / count,
        "weight_max": records[:, _COLUMN["weight_max"]].nan_to_num(-torch.inf).max() / count,
        "padding_share": 1 - total["real_tokens"] / total["padded_tokens"],
        "length_loss_covariance": by_batch - mean_length * by_sequence,
        "count_min": counts.min(),
        "count_max": counts.max(),
        "mean_of_means_error": (mean_of_means - loss).abs() / loss.abs(),
    }
    if isinstance(module.normalization, ConstantLength):
        logs["loss_constant"] = by_batch / module.normalization.max_length + own
    logs["terms_agree"] = (total["disagreements"] == 0).double()
    of_terms = records[:, len(_FIELDS) :].sum(0).reshape(len(module.terms), len(_TERM_FIELDS))
    for name, (weight, of_term) in zip(module.terms, of_terms, strict=True):
        coefficient = module.micro_batch_loss.terms[name].coefficient
        logs[f"{name}/weight"] = coefficient * weight / count
        if coefficient != 0:
            logs[f"{name}/denominator"] = of_term * count / weight
    return logs
