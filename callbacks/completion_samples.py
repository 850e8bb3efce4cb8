"""Evaluation and logging of the student's completions."""

from collections.abc import Collection, Sequence

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.batch import FILLER_ROW, Batch, PromptBatch, has_prompts, references_of
from lightning_kd.callbacks.evaluations import SPLITS, EvaluationCallback, Stage
from lightning_kd.callbacks.reference_checks import (
    check_data,
    check_states,
    check_works,
    measure,
)
from lightning_kd.callbacks.text_tables import log_table
from lightning_kd.collectives import any_process
from lightning_kd.evaluation import (
    CompletionMetric,
    CompletionScore,
    ExactMatch,
    MeanScore,
    as_metric,
    computed,
    metric_name,
)
from lightning_kd.evaluation.token_means import TokenMeans
from lightning_kd.generation import GenerationOptions
from lightning_kd.models.positions import check_length
from lightning_kd.modules import DistillationModule
from lightning_kd.modules.student_module import longest_rows
from lightning_kd.strategies import adapter_of


class CompletionSamples(EvaluationCallback):
    """Complete validation prompts; log metrics of the completions and a table of samples.

    Each prompt is completed once, for all metrics, by default greedily. Logs their numbers as
    ``val/exact_match`` (``test/exact_match``) and so on, over the first ``batches`` batches, and the
    table ``val/samples`` to each logger that can show one (TensorBoard, Weights & Biases).
    ``val/completions_cut`` is the share of completions that ``max_new_tokens`` cut: they have so many
    tokens, no EOS and none of ``stop_strings``, and are measured as they are. Batches without prompts
    are skipped; if there are no others, ``metrics`` that were given are refused.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
        batches: Number of evaluation batches that each rank completes; -1 for all.
        samples: Number of rows of the table.
        metrics: What completions are measured by: ``ExactMatch``, ``GSM8KAccuracy``, ``RougeL``,
            ``DistinctN``, ``Repetition``, any ``torchmetrics`` class of texts and lists of references
            by its import path, or a function by its own: ``(completion, references) -> number``, of
            which the mean is logged. Defaults to ``[ExactMatch]``.
        temperature: 0 takes the most likely token; above 0, samples at this temperature, seeded by
            ``seed_everything`` and each row's number.
        top_k: When sampling, keep only the most likely tokens; 0 keeps all.
        top_p: When sampling, keep the smallest set of tokens with this probability; 1 keeps all.
        completions_per_prompt: Samples of each prompt; means are over all of them.
        stop_strings: Texts at which a completion is cut before it is measured, as a model without
            fine-tuning goes on with the next question.

    Raises:
        ValueError: If a value is out of its range, or something in ``metrics`` is no metric.
    """

    def __init__(
        self,
        max_new_tokens: int = 128,
        batches: int = -1,
        samples: int = 8,
        metrics: list[CompletionMetric | CompletionScore] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        completions_per_prompt: int = 1,
        stop_strings: list[str] | None = None,
    ) -> None:
        if batches < -1 or batches == 0:
            raise ValueError(f"batches is {batches}; give 1 or more, or -1 for all")
        if samples < 0:
            raise ValueError(f"samples is {samples}; it must be 0 or more")
        if completions_per_prompt < 1 or (completions_per_prompt > 1 and temperature == 0):
            raise ValueError(
                f"completions_per_prompt is {completions_per_prompt} at temperature {temperature}; it "
                "must be 1 or more, and 1 at temperature 0, where all completions are the same one"
            )
        if metrics == [] or "" in (stop_strings or []):
            what = "metrics" if metrics == [] else "one of stop_strings"
            raise ValueError(f"{what} is empty; leave it out")
        self.options = GenerationOptions(max_new_tokens, temperature, top_k, top_p)
        self.batches, self.samples = batches, samples
        self.completions_per_prompt, self.stop_strings = completions_per_prompt, stop_strings or []
        self._are_given = metrics is not None
        self.metrics: list[Metric] = [as_metric(given) for given in metrics or [ExactMatch()]]
        self._cut = TokenMeans(("completions_cut",))
        self._table: list[tuple[str, str, str]] = []

    @property
    def needs_validation(self) -> bool:
        """Whether metrics were asked for."""
        return self._are_given

    def names(self) -> Collection[str]:
        """Return the names of the metrics that tell them, and that of the share that is cut."""
        told = [name for metric in self.metrics for name in _told_names(metric)]
        return [*told, *self._cut.names]

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Validate that prompts and completions fit into the student's positions, and references.

        Raises:
            ValueError: If they are longer, the module's engine cannot generate with the student or by
                these options, a metric cannot be computed, or two have one name.
        """
        seen = {*self._cut.names}
        for metric in self.metrics:
            _check_new(metric, seen, _told_names(metric))
            seen |= {*_told_names(metric)}
        if not isinstance(module, DistillationModule):
            return
        known = longest_rows(trainer).get(SPLITS[stage])
        if known is None or known[1] > 0:
            module.check_generation(self.options)
        if known is not None and known[1] > 0:
            length = known[1] + self.options.max_new_tokens
            what = "prompts and max_new_tokens of CompletionSamples"
            check_length({"student": module.student}, length, what)
        check_states(self.metrics, trainer.world_size)
        check_works(self.metrics)
        check_data(self.metrics, trainer, SPLITS[stage], self.batches)

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget the completions of an evaluation before."""
        for metric in (*self.metrics, self._cut):
            metric.reset()
        self._table = []

    def add(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Complete the prompts of a batch, and measure the completions."""
        beyond = self.batches != -1 and batch_idx >= self.batches
        if beyond or not has_prompts(batch) or not isinstance(module, DistillationModule):
            return
        completed = [self._complete(module, batch, n) for n in range(self.completions_per_prompt)]
        rows = [
            (prompt, text, references, is_cut)
            for row, prompt, of_row, references in zip(
                batch["row"].tolist(),
                batch["prompt"],
                zip(*completed, strict=True),
                references_of(batch),
                strict=True,
            )
            if row != FILLER_ROW
            for text, is_cut in of_row
        ]
        for metric in (*self.metrics, self._cut):
            metric.to(module.device)
        for metric in self.metrics:
            measure(metric, [row[1] for row in rows], [row[2] for row in rows])
        cut = torch.tensor([row[3] for row in rows], dtype=torch.float64, device=module.device)
        self._cut.update({"completions_cut": cut})
        shown = rows[: self.samples - len(self._table)]
        self._table += [(row[0], row[1], "\n".join(row[2])) for row in shown]

    def _complete(
        self, module: DistillationModule, batch: PromptBatch, number: int
    ) -> list[tuple[str, bool]]:
        """Complete each prompt; return the texts, and whether ``max_new_tokens`` cut them."""
        purpose = f"samples/{number}" if number else "samples"
        with adapter_of(module.trainer).outside_of_steps():
            completions = module.complete(batch, purpose=purpose, options=self.options)
        is_full = completions.mask.sum(-1) >= self.options.max_new_tokens
        unended = (is_full & ~completions.ended).tolist()
        texts = completions.texts(module.tokenizer)
        stopped = [cut_at(text, self.stop_strings) for text in texts]
        return [
            (kept, is_cut and kept == text)
            for kept, text, is_cut in zip(stopped, texts, unended, strict=True)
        ]

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Log the metrics and the table.

        Raises:
            ValueError: If metrics were given, and there was no prompt to complete.
        """
        # On every rank: one without a row or a batch must take part in the sum.
        measured = any_process(self.metrics[0].update_called, module.device)
        if not measured and self._are_given:
            names = ", ".join(map(metric_name, self.metrics))
            raise ValueError(
                f"CompletionSamples is to measure {names}, and data.{SPLITS[stage]} has no prompts to "
                "complete; use data with prompts, or leave metrics out"
            )
        if measured:
            self.log_values(trainer, module, stage, self._values(module), prog_bar=True)
            cut = self._cut.to(module.device).compute()
            self.log_values(trainer, module, stage, cut)
        if self._table:
            header = ("prompt", "completion", "reference")
            log_table(trainer, f"{stage}/samples", header, self._table, trainer.global_step)
        self.begin(trainer, module)

    def _values(self, module: L.LightningModule) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for metric in self.metrics:
            if not metric.update_called:
                metric.to(module.device).update([], [])
            found = computed(metric)
            _check_new(metric, {*values, *self._cut.names}, found)
            values |= found
        return values


def _told_names(metric: Metric) -> Sequence[str]:
    """Return the names of a metric's numbers, as far as it tells them before they are computed."""
    return metric.names if isinstance(metric, MeanScore) else ()


def _check_new(metric: Metric, taken: Collection[str], names: Collection[str]) -> None:
    """Refuse a metric one of whose names is another's."""
    for name in names:
        if name in taken:
            raise ValueError(
                f"{metric_name(metric)} would log {name}, a name that another number has; give it "
                "another name"
            )


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    r"""Return what stands before the first of some texts.

    Example:
        >>> cut_at("72\n\nQuestion: What", ["Question:", "\n\n"])
        '72'
    """
    return text[: min((text.find(stop) for stop in stop_strings if stop in text), default=None)]
