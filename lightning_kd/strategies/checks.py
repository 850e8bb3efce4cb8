"""Validation of a trainer before it starts."""

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_kd.resuming import Resumable
from lightning_kd.strategies.adapter import adapter_of


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning accepts and what would divide the loss wrongly.

    Raises:
        ValueError: If a setting, a callback or the strategy is not supported.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every < 0:
        raise ValueError(f"trainer.log_every_n_steps is {every}; it must be 0 or more")
    for finder in searches_of(trainer):
        _check_search(trainer, finder)
    if getattr(trainer.lightning_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "torch.compile of a whole module would compile its steps, logs and checks as well; hand "
            "over the module itself, and compile the layers of its models in place: for layer in "
            "model.model.layers: layer.compile()"
        )
    adapter_of(trainer).check()


def searches_of(trainer: L.Trainer) -> list[BatchSizeFinder | LearningRateFinder]:
    """Return the callbacks of a trainer that search for a batch size or a learning rate."""
    kinds = (BatchSizeFinder, LearningRateFinder)
    return [c for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]


def _check_search(trainer: L.Trainer, finder: BatchSizeFinder | LearningRateFinder) -> None:
    name = type(finder).__name__
    if not finder._early_exit:
        function, option = ("scale_batch_size", "data.batch_size")
        if isinstance(finder, LearningRateFinder):
            function, option = ("lr_find", "model.optimizer.lr")
        raise ValueError(
            f"{name} in trainer.callbacks tries out steps and takes them back inside a run, whose "
            "rows, seeds and rollouts follow the steps that were taken. Search before it, in Python: "
            f"lightning.pytorch.tuner.Tuner(trainer).{function}(module, datamodule=...); or compare "
            f"short runs with other values of {option}"
        )
    # A search leaves all other callbacks out.
    changing = [c for c in trainer.callbacks if isinstance(c, Resumable)]  # type: ignore[attr-defined]
    if changing:
        raise ValueError(
            f"{name} searches without the other callbacks, and {type(changing[0]).__name__} decides "
            "what is trained on: it would measure another run. Compare short runs instead"
        )
