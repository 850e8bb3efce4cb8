"""Log-probabilities of sampled tokens, as they were recorded and in the training step that follows."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX, Batch, Rollout
from lightning_kd.callbacks.rollouts.statistics import passes_multiple
from lightning_kd.generation import GenerationOptions
from lightning_kd.modules import DistillationModule


class LogProbDifference:
    r"""Absolute difference of :math:`\log q(y)` between sampling and the first step of a window.

    The weights are the same, so what is there without dropout is round-off: a cache instead of one
    pass, other kernels, fewer bits. The ratio of a policy gradient takes it for a change of the
    student. Measured at temperature 1, where tokens were sampled at it or greedily.

    Args:
        options: How completions are sampled.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self._is_known = options.temperature in {0.0, 1.0}
        self._step: int | None = None
        self._is_due = False
        self._values: Tensor | None = None

    def begin(self, step: int) -> None:
        """Begin a window that the student has generated before an optimizer step."""
        self._step, self._values = step, None

    def prepare(self, module: DistillationModule, on_policy: bool) -> None:
        """Begin a micro-batch: it counts if the student has sampled it, at a step that is logged."""
        step, every = module.global_step, module.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_fresh = on_policy and self._is_known and step == self._step
        self._is_due = is_fresh and passes_multiple(step, step + 1, every)

    def add(self, module: DistillationModule, batch: Batch) -> None:
        """Add a micro-batch that has been trained on; all ranks call this together."""
        if not self._is_due or "log_probs" not in batch:
            return
        positions = module.micro_batch_loss.positions  # which may be some of those that have labels
        recorded = positions.of_tokens(cast(Rollout, batch)["log_probs"]).double()
        nats = module.compared_label_nats
        difference = (recorded + nats).abs()[positions.targets != IGNORE_INDEX]
        total = torch.stack([difference.sum(), difference.new_tensor(len(difference))])
        largest = module.trainer.strategy.all_gather(torch.cat([difference, total[:1] * 0]).max())
        added = torch.cat([module.sum_over_ranks(total), largest.max()[None]])
        if self._values is not None:
            values = torch.stack([self._values.to(added.device), added])
            added = torch.cat([values[:, :2].sum(0), values[:, 2:].amax(0)])
        self._values = added

    def metrics(self) -> Mapping[str, Tensor]:
        """Return mean and maximum over the tokens of all ranks, if there are any."""
        if self._values is None or self._values[1] == 0:
            return {}
        total, count, largest = self._values.unbind()
        return {"log_prob_difference_mean": total / count, "log_prob_difference_max": largest}

    def state_dict(self) -> dict[str, Any]:
        """Return the same on all ranks, for a checkpoint."""
        return {"step": self._step, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._step, self._values = state["step"], state["values"]
