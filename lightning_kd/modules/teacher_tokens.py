"""Token budgets of several teachers: how many tokens each has scored."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_kd.batch import Batch
from lightning_kd.modules.loss import MicroBatchLoss
from lightning_kd.modules.measured import narrow
from lightning_kd.teachers import Teacher

_CHECKPOINT_KEY = "teacher_tokens"


class TeacherTokens(Callback):
    """Counts the tokens that each of several teachers has scored in training since the run began.

    Logs them at logged steps as ``train/teacher_tokens/NAME``, over all ranks; of one teacher for all
    rows nothing is logged. Tokens that took part in the loss are counted, whoever has written them,
    and each time that they did.
    """

    def __init__(self) -> None:
        self._begin({})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin a run."""
        self._begin({})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Find whose rows those of a micro-batch are, generated ones included."""
        self._routed = cast(_Routed, pl_module).teacher.routes(batch)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the micro-batch: before any callback could save at its end."""
        if self._routed is None:
            return
        (names, numbers), self._routed = self._routed, None
        tokens = cast(_Routed, pl_module).micro_batch_loss.positions.tokens_per_row
        counts = torch.zeros(len(names), dtype=torch.long, device=tokens.device)
        self._add(trainer, names, counts.index_add(0, numbers.to(tokens.device), tokens))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log the totals, with this step."""
        module = cast(_Routed, pl_module)
        if self._names and module._logs_this_step():
            totals = zip(self._names, self._totals(module), strict=True)
            pl_module.log_dict(
                {f"train/teacher_tokens/{name}": narrow(total) for name, total in totals}
            )

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the counts of all ranks; they call this together."""
        if self._names:
            totals = self._totals(cast(_Routed, pl_module)).tolist()
            checkpoint[_CHECKPOINT_KEY] = dict(zip(self._names, totals, strict=True))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the counts of a checkpoint."""
        if trainer.state.fn is TrainerFn.FITTING:
            self._begin(checkpoint.get(_CHECKPOINT_KEY, {}))

    def _begin(self, before: dict[str, int]) -> None:
        self._before, self._names, self._counts = before, tuple(before), None
        self._routed = None

    _routed: tuple[Sequence[str], Tensor] | None
    """Names of the teachers, and the number of each row's, of the micro-batch that is trained on."""

    _names: tuple[str, ...]
    _counts: Tensor | None
    """Of this rank, ``(teachers,)``; the first has those of a checkpoint."""

    def _add(self, trainer: L.Trainer, names: Sequence[str], counts: Tensor) -> None:
        if self._counts is None:
            self._names = tuple(names)
            saved = [self._before.get(name, 0) * trainer.is_global_zero for name in names]
            self._counts = torch.tensor(saved, device=counts.device)
        self._counts = self._counts + counts

    def _totals(self, module: "_Routed") -> Tensor:
        """Return the counts of all ranks, ``(teachers,)``, float64: exact up to 9e15 tokens."""
        if self._counts is None:  # resumed, and saved again before a step
            return torch.tensor(list(self._before.values()), dtype=torch.float64)
        return module.sum_over_ranks(self._counts.double())


class _Routed(Protocol):
    teacher: Teacher
    micro_batch_loss: MicroBatchLoss

    def _logs_this_step(self, *, taken: int = 0) -> bool: ...

    def sum_over_ranks(self, values: Tensor) -> Tensor: ...
