"""Comparison of student and teacher on what the student writes."""

from collections.abc import Collection, Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.batch import FILLER_ROW, Batch, PromptBatch, has_prompts
from lightning_kd.callbacks.comparison import Compared, compared
from lightning_kd.callbacks.evaluations import SPLITS, EvaluationCallback, Stage
from lightning_kd.callbacks.rollouts.generation import complete
from lightning_kd.collectives import any_process
from lightning_kd.divergences import ReverseKL, TotalVariation
from lightning_kd.evaluation import Overlap
from lightning_kd.evaluation.speculative import speed_up, tokens_per_call
from lightning_kd.evaluation.token_means import TokenMeans
from lightning_kd.fused import (
    DivergenceTerm,
    TeacherTokenLogProb,
    TokenTerm,
)
from lightning_kd.generation import SamplingOptions, engine_for, rollout_batch
from lightning_kd.models.positions import check_length
from lightning_kd.modules import TeacherModule
from lightning_kd.modules.student_module import longest_rows
from lightning_kd.modules.texts import check_own_samples
from lightning_kd.strategies import adapter_of
from lightning_kd.teachers import TEACHERS, choose_kind
from lightning_kd.tokenization import padding_id

_DISTANCE = DivergenceTerm(TotalVariation())


class OwnCompletions(EvaluationCallback):
    r"""Sample completions from the student, and log what the teacher says of them.

    The first ``prompts`` rows of an evaluation are completed, at temperature 1 from the whole
    distribution. With student :math:`q` and teacher :math:`p`, means over the sampled tokens:

    ==============================  ===========================================================
    ``own_teacher_nats_per_token``  :math:`-\log p(y_t \mid y_{<t})`: how unlikely the student's
                                    text is to the teacher
    ``own_reverse_kl``              :math:`KL(q \| p)`
    ``own_acceptance``              :math:`1 - TV(p, q)`: the probability that speculative decoding
                                    keeps a token that the student drafts
    ``acceptance``                  the same on the completions of the data, where it has some
    ``tokens_per_teacher_call``     expected from ``acceptance``, or else ``own_acceptance``, for
                                    drafts of ``gamma`` tokens
    ``speculative_speed_up``        the same over :math:`\gamma c + 1`, if ``cost_ratio`` is given
    ``own_top_k_overlap`` ...       as in :class:`~lightning_kd.evaluation.Overlap`, with ``overlap_k``
    ==============================  ===========================================================

    They stand under ``val/`` and ``test/``. The teacher must give the whole distribution.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
        prompts: Rows that are completed, the first ones of the data.
        samples_per_prompt: Completions of each.
        gamma: Tokens of a draft of speculative decoding.
        cost_ratio: Time of a step of the student over that of one of the teacher.
        overlap_k: Compares the k most likely tokens of each side.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*, ICML 2023.
        https://arxiv.org/abs/2211.17192
    """

    def __init__(
        self,
        max_new_tokens: int = 128,
        prompts: int = 64,
        samples_per_prompt: int = 1,
        gamma: int = 4,
        cost_ratio: float | None = None,
        overlap_k: int | None = None,
    ) -> None:
        for name, value, least in (
            ("prompts", prompts, 1),
            ("samples_per_prompt", samples_per_prompt, 1),
            ("gamma", gamma, 1),
            ("cost_ratio", cost_ratio, 0),
            ("overlap_k", overlap_k, 1),
        ):
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        self.options = SamplingOptions(max_new_tokens)
        self.prompts, self.samples_per_prompt = prompts, samples_per_prompt
        self.gamma, self.cost_ratio = gamma, cost_ratio
        self.overlap = None if overlap_k is None else Overlap(overlap_k)
        own = ("own_teacher_nats_per_token", "own_reverse_kl", "own_acceptance")
        shared = tuple(f"own_{name}" for name in Overlap.names)
        self._means = TokenMeans((*own, *shared, "acceptance"))
        self._is_over = False

    @property
    def metrics(self) -> list[Metric]:
        """What is added up over an evaluation."""
        return [self._means]

    def names(self) -> Collection[str]:
        """Return the names of the means, and of what follows from them."""
        return [*self._means.names, "tokens_per_teacher_call", "speculative_speed_up"]

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Validate the teacher, and that prompts and completions fit.

        Raises:
            ValueError: If the teacher cannot be asked, they are too long for a model, or the module's
                engine cannot generate with the student.
        """
        own = type(self).__name__
        if not isinstance(module, TeacherModule):
            raise ValueError(
                f"{own} compares the student with a teacher, and {type(module).__name__} has none; "
                "take a method with one, such as SupervisedKD, or leave the callback out"
            )
        self.check_teacher(module)
        module.check_generation(self.options)
        if self.overlap is not None and self.overlap.k > module.width:
            raise ValueError(
                f"overlap_k is {self.overlap.k}, and there are {module.width} tokens; lower it"
            )
        prompt = longest_rows(trainer).get(SPLITS[stage], (0, 0))[1]
        length = prompt + self.options.max_new_tokens
        check_length(module.models, length, f"prompts and max_new_tokens of {own}")

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget the completions of an evaluation before."""
        self._is_over = False
        for metric in self.metrics:
            metric.reset()

    def add(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Complete the prompts of a batch, until there are enough."""
        assert isinstance(module, TeacherModule)
        if self._is_over or not has_prompts(batch):
            return
        chosen = (batch["row"] != FILLER_ROW) & (batch["row"] < self.prompts)
        # Together: models in shards generate on all processes at once.
        if not any_process(bool(chosen.any()), module.device):
            self._is_over = True
            return
        for metric in self.metrics:
            metric.to(module.device)
        with adapter_of(trainer).outside_of_steps():
            for number in range(self.samples_per_prompt):
                self.add_samples(module, batch, chosen, number)
            of_data = compared(module, batch, chosen)
            self._means.update({"acceptance": 1 - of_data.values([_DISTANCE])[0]})

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Log the means.

        Raises:
            ValueError: If there was no prompt to complete.
        """
        if not any_process(self._means.update_called, module.device):
            raise ValueError(
                f"{type(self).__name__} completes prompts, and the data has none; use data with "
                "prompts (DocumentData has some with prompt_length)"
            )
        for metric in self.metrics:
            metric.to(module.device)
        self.log_values(trainer, module, stage, self.values())

    def check_teacher(self, module: TeacherModule) -> None:
        """Refuse a teacher that cannot be asked.

        Raises:
            ValueError: If it does not answer the whole distribution on samples.
        """
        choose_kind(module.teacher, ("full_distribution",), type(self).__name__, TEACHERS)
        check_own_samples(module, module.teacher)

    def add_samples(
        self, module: TeacherModule, batch: PromptBatch, chosen: Tensor, number: int
    ) -> None:
        """Sample a completion of each prompt and add what is compared.

        Args:
            module: Has student and teacher.
            batch: The prompts.
            chosen: True for the rows that count, ``(B,)``.
            number: Of the sample among those of a prompt.
        """
        self.add_own(self.sampled(module, batch, chosen, number, on_policy=True))

    def add_own(self, own: Compared, further: Sequence[TokenTerm] = ()) -> Tensor:
        """Add what is compared on the student's text; return the values of further terms."""
        shared = [] if self.overlap is None else self.overlap.token_terms(own.teacher)
        terms = [TeacherTokenLogProb(own.positions.targets), DivergenceTerm(ReverseKL()), _DISTANCE]
        log_probs, divergence, distance, *others = own.values([*terms, *shared, *further])
        self._means.update(
            {
                "own_teacher_nats_per_token": -log_probs,
                "own_reverse_kl": divergence,
                "own_acceptance": 1 - distance,
            }
        )
        names = [f"own_{name}" for name in Overlap.names]
        self._means.update(dict(zip(names, others[: len(shared)], strict=False)))
        return torch.stack(others[len(shared) :]) if further else distance[:0]

    def sampled(
        self,
        module: TeacherModule,
        batch: PromptBatch,
        chosen: Tensor,
        number: int,
        *,
        on_policy: bool,
    ) -> Compared:
        """Return both models' distributions on a completion of each prompt, by one of them."""
        engine = engine_for(self.options, module.engine)
        if on_policy:
            engine.update(module.student)
        given = {**batch, "sample": batch["row"] * self.samples_per_prompt + number}
        prompts = cast(PromptBatch, given)
        completions = complete(
            module,
            [prompts],
            self.options,
            engine=engine,
            on_policy=on_policy,
            mixture_alpha=0.0,
            rows_at_once=None,
        )
        rollout = rollout_batch(prompts, completions, pad_id=padding_id(module.tokenizer))
        return compared(module, rollout, chosen)

    def values(self) -> dict[str, Tensor]:
        """Return what is logged, by name, computed over all processes."""
        means = self._means.compute()
        drafted = means.get("acceptance", means.get("own_acceptance"))
        if drafted is None:
            return means
        calls = {"tokens_per_teacher_call": tokens_per_call(drafted.item(), self.gamma)}
        if self.cost_ratio is not None:
            factor = speed_up(drafted.item(), self.gamma, self.cost_ratio)
            calls["speculative_speed_up"] = factor
        return means | {name: drafted.new_tensor(value) for name, value in calls.items()}
