"""Validation of a trainer before it starts."""

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_kd.strategies.adapter import adapter_of


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning accepts and what would divide the loss wrongly.

    Raises:
        ValueError: If a setting, a callback or the strategy is not supported.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every < 0:
        raise ValueError(f"trainer.log_every_n_steps is {every}; it must be 0 or more")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ValueError(
                f"{type(callback).__name__} tries out steps and takes them back, but rows, seeds and "
                "rollouts of this library follow the steps that were taken. Leave it out, and compare "
                "short runs with other values of data.batch_size or model.optimizer.lr"
            )
    if getattr(trainer.lightning_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "torch.compile of a whole module would compile its steps, logs and checks as well; hand "
            "over the module itself, and compile the layers of its models in place: for layer in "
            "model.model.layers: layer.compile()"
        )
    adapter_of(trainer).check()
