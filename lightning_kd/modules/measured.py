"""Logging of what is measured beside the loss; the bytes of text that labels stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import IGNORE_INDEX, Batch
from lightning_kd.evaluation import DistributionMetrics
from lightning_kd.fused import AlignedAnswer
from lightning_kd.loops.logged_values import forget_values
from lightning_kd.modules.loss import Scores
from lightning_kd.scoring import ScoredPositions
from lightning_kd.token_bytes import TokenBytes


@dataclass(frozen=True)
class LabelLikelihood:
    """What each label of an evaluated micro-batch costs, and how much text it is."""

    positions: ScoredPositions
    nats: Tensor
    """Minus the student's log-probability of each label, ``(N,)``."""
    bytes: Tensor | None
    """Of text, ``(N,)``; below 0 where a token's are not known, None where no token's are."""

    def per_row(self) -> Tensor:
        """Return nats, tokens and bytes of each row, ``(B, 3)``, float64; NaN for unknown bytes.

        Example:
            >>> positions = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8], [-100, -100, 9]]))
            >>> nats, size = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 0, -1])
            >>> LabelLikelihood(positions, nats, size).per_row().tolist()
            [[3.0, 2.0, 3.0], [4.0, 1.0, nan]]
        """
        labeled = self.positions.targets != IGNORE_INDEX
        size = self.nats.new_full(self.nats.shape, float("nan"), dtype=torch.float64)
        if self.bytes is not None:
            size = self.bytes.double().masked_fill(self.bytes < 0, float("nan"))
        values = torch.stack([self.nats.double(), torch.ones_like(size), size], -1)[labeled]
        rows = values.new_zeros(len(self.positions.mask), 3)
        return rows.index_add(0, self.positions.rows[labeled], values)


class MeasuredModule(L.LightningModule):
    """A module that logs metrics, and says after each evaluated batch what its labels cost."""

    tokenizer: PreTrainedTokenizerBase

    label_nats: Tensor
    """Of the last micro-batch that was measured, over all tokens of the student, ``(N,)``."""

    compared_label_nats: Tensor
    """The same over the tokens that student and teacher share, of which completions are sampled."""

    label_likelihood: LabelLikelihood
    """Of the last evaluated batch, for callbacks."""

    train_distribution: DistributionMetrics
    eval_distribution: DistributionMetrics

    _logged: frozenset[str] = frozenset()
    """What the last training step with metrics had."""

    _known: tuple[PreTrainedTokenizerBase, TokenBytes | None] | None = None

    def token_bytes(self) -> TokenBytes | None:
        """Return the bytes of the tokenizer's tokens; None if they are not known."""
        tokenizer = self.tokenizer
        if self._known is None or self._known[0] is not tokenizer:
            try:
                found: TokenBytes | None = TokenBytes.of_tokenizer(tokenizer)
            except ValueError:
                found = None
            self._known = (tokenizer, found)
        return self._known[1]

    def count_bytes(self, batch: Batch, scores: Scores) -> None:
        """Add the bytes of an evaluated batch's labels to the metrics, where they are known."""
        self.label_likelihood = self._label_likelihood(batch, scores)
        nats, size = self.label_likelihood.nats, self.label_likelihood.bytes
        if size is not None:
            labeled = scores.positions.targets != IGNORE_INDEX
            self.eval_distribution.update_bytes(nats[labeled], size[labeled])

    def count_trained_bytes(self, batch: Batch, scores: Scores) -> None:
        """Add the bytes of the rows that are trained on, beside a teacher with other tokens.

        A row with a token whose bytes are not known, such as an ``<unk>`` that the student has
        generated, is left out, with its nats.
        """
        if not (isinstance(scores.teacher, AlignedAnswer) and self._logs_this_step()):
            return
        nats, _, size = self._label_likelihood(batch, scores).per_row().T
        known = ~size.isnan()
        self.train_distribution.update_bytes(nats[known], size[known])

    def _label_likelihood(self, batch: Batch, scores: Scores) -> LabelLikelihood:
        """Return nats and bytes of the labels of the batch that was measured."""
        known, ids, size = self.token_bytes(), batch["input_ids"], None
        if known is not None:
            size = known.to(ids.device).of(ids, _begins_text(batch))
            size = scores.positions.of_tokens(size)
        return LabelLikelihood(scores.positions, self.label_nats, size)

    def _logs_this_step(self, *, taken: int = 0) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1 - taken) % every == 0

    def _log_terms(
        self, stage: str, means: Mapping[str, Tensor | float], names: Sequence[str], shown: set[str]
    ) -> None:
        # Lightning would average two values of one name, so a metric of that name stands alone: it
        # means the same in every run.
        values = {f"{stage}/{name}": means[name] for name in names}
        new = {name: value for name, value in values.items() if name not in shown}
        self.log_dict(new, sync_dist=stage != "train")

    def _log_gradient_norm(self, norm: Tensor | None) -> None:
        if norm is not None:
            self.log("train/grad_norm", norm)

    def _log_distribution(self, stage: str, metrics: DistributionMetrics) -> set[str]:
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        if stage == "train":
            forget_values(self.trainer, self._logged.difference(values))
            self._logged = frozenset(values)
        self.log_dict(values, sync_dist=stage != "train")
        metrics.reset()
        return set(values)


def narrow(value: Tensor | float) -> Tensor:
    """Return a value as it is logged: Lightning would copy a number to the device, and wait for it."""
    return torch.as_tensor(value).to(torch.get_default_dtype())


def _begins_text(batch: Batch) -> Tensor | None:
    """Return True where what is trained on begins a text that was tokenized by itself, ``(B, T)``."""
    if "tokenized_apart" not in batch:
        return None
    labeled = batch["labels"] != IGNORE_INDEX
    first = labeled & ~F.pad(labeled[:, :-1], (1, 0))
    return first & batch["tokenized_apart"][:, None]
