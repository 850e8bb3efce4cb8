"""Parameter groups of the optimizer, and a schedule that a configuration file can name."""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig, OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_kd.loops import EpochLoader, check_validates
from lightning_kd.strategies import shape_of


def parameter_groups(parameters: Iterable[Parameter]) -> list[dict[str, Any]]:
    """Return trainable weights in two groups: matrices, and vectors (biases, norms) without decay."""
    trainable = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if len(shape_of(p)) > 1]},
        {"params": [p for p in trainable if len(shape_of(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def built_optimizer(build: OptimizerCallable, parameters: Iterable[Parameter]) -> Optimizer:
    """Build an optimizer of those parameters that train.

    Args:
        build: The class, with its options.
        parameters: Those of a model.

    Raises:
        ValueError: If it does not take its options.
    """
    if not callable(build):
        raise ValueError(
            f"optimizer is a {type(build).__name__}; give a class of torch.optim, or one with options: "
            "functools.partial(torch.optim.AdamW, lr=1e-4)"
        )
    groups = parameter_groups(parameters)
    if any(weight.dtype == torch.float16 for group in groups for weight in group["params"]):
        rank_zero_warn(
            "weights that are trained are float16, whose smallest number is above the 1e-8 by which "
            "AdamW keeps from dividing by zero: losses become NaN. Load the student in float32, with "
            "trainer.precision: 16-mixed if you want float16 products, or in bfloat16"
        )
    try:
        return build(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the optimizer refuses its options: {error}") from error


class WarmupCosine(LambdaLR):
    r"""Linear warm-up to the optimizer's rate, then half a cosine down to ``min_ratio`` of it.

    With :math:`s` steps taken, :math:`w` warm-up steps, :math:`S` steps in all and :math:`r` the
    ``min_ratio``, the rate is multiplied by

    .. math:: \min\Bigl(\tfrac{s+1}{w},\;
        r + (1-r)\,\tfrac12\bigl(1 + \cos(\pi\, \tfrac{s-w}{S-w})\bigr)\Bigr).

    Args:
        optimizer: What is scheduled.
        warmup_steps: Optimizer steps until the full rate.
        total_steps: Steps of the schedule. Defaults to the trainer's.
        min_ratio: Last rate over full rate.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, warmup_steps=2, total_steps=4)
        >>> [round(schedule.factor(step), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps is {total_steps}; it must be above warmup_steps, {warmup_steps}"
            )
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio is {min_ratio}; it must lie in [0, 1]")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_ratio = min_ratio
        super().__init__(optimizer, self.factor)

    def end_with_run(self, steps: int | float) -> None:
        """Set ``total_steps`` to the length of the run; warn if all of it is warm-up.

        Raises:
            ValueError: If the run has no end.
        """
        if math.isinf(steps):
            raise ValueError(
                "WarmupCosine ends with the run, and this run has no end: give trainer.max_steps, "
                "trainer.max_epochs or lr_scheduler.total_steps"
            )
        if 0 < steps < self.warmup_steps:
            rank_zero_warn(
                f"warmup_steps is {self.warmup_steps} and the run has {int(steps)} optimizer steps: "
                f"the learning rate ends at {steps / self.warmup_steps:.0%} of the optimizer's. Give "
                "a smaller --model.lr_scheduler.warmup_steps, unless this is only to try something"
            )
        self.total_steps = int(steps)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate after ``step`` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.min_ratio + (1 - self.min_ratio) * cosine

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the step count; the shape of the schedule is that of this run."""
        shape = {"warmup_steps", "total_steps", "min_ratio"}
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in shape})


def with_schedule(optimizer: Optimizer, scheduler: Any) -> OptimizerLRScheduler:
    """Return an optimizer with a schedule that is stepped with it, or by the metric that it depends on.

    Raises:
        ValueError: If the metric is not named.
    """
    monitor = getattr(scheduler, "monitor", None)
    if isinstance(scheduler, ReduceLROnPlateau) and not monitor:
        raise ValueError(
            "model.lr_scheduler is a ReduceLROnPlateau without a monitor; use "
            "lightning.pytorch.cli.ReduceLROnPlateau, with the metric that it depends on "
            "(monitor: val/loss)"
        )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": monitor},
    }


def check_schedule(config: LRSchedulerConfig, trainer: L.Trainer) -> None:
    """Validate that the metric that a schedule depends on will exist.

    Raises:
        ValueError: If it is a metric of validation, and the run does not validate.
    """
    validated = config.reduce_on_plateau and str(config.monitor).startswith("val/")
    if validated and not trainer.enable_validation:
        raise ValueError(
            f"model.lr_scheduler depends on {config.monitor}, and this run does not validate "
            "(limit_val_batches, data); enable validation, or choose another monitor or schedule"
        )
    loader = trainer.train_dataloader
    if validated and isinstance(loader, EpochLoader):
        check_validates(trainer, loader, "model.lr_scheduler", str(config.monitor))
