"""The plan of a run's rollouts, and the loader that keeps it."""

from typing import Any, Protocol, cast, runtime_checkable

import lightning as L
from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_kd.batch import Batch, Rollout, copy_of
from lightning_kd.data import PairedLoader, RolloutPlan, TrainingLoader, WindowedLoader
from lightning_kd.modules import DistillationModule


@runtime_checkable
class PlannedData(Protocol):
    """A data module that cuts its training rows into windows of rollouts."""

    def follow_plan(self, plan: RolloutPlan, *, given_by: str) -> None:
        """Take the plan of a run, and the name of the callback that gives it."""


def give_plan(
    trainer: L.Trainer, module: L.LightningModule, plan: RolloutPlan, *, given_by: str
) -> None:
    """Have the training rows cut into windows: by a data module, or around a loader of the user's.

    Args:
        trainer: Whose data is set up, and whose loaders are not made yet.
        module: That is to be trained.
        plan: Windows, passes and groups.
        given_by: The callback, for errors.

    Raises:
        ValueError: If the loader does not lend itself to it.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PlannedData):
        data.follow_plan(plan, given_by=given_by)
        return
    if not isinstance(module, DistillationModule):
        return  # refused by name as soon as all is set up
    source = trainer.fit_loop._data_source
    loader = source.dataloader()
    if isinstance(loader, WindowedLoader):
        raise ValueError(
            f"two callbacks, {given_by} the second, would both generate the completions of this run; "
            "give trainer.callbacks only one of them"
        )
    if isinstance(loader, dict | list | tuple | CombinedLoader):
        raise ValueError(
            f"{given_by} needs one training loader, not a {type(loader).__name__} of them; join their "
            "data sets (torch.utils.data.ConcatDataset), or use a data module of this library"
        )
    prepared = _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, loader)
    source.instance = WindowedLoader(
        prepared,  # type: ignore[arg-type]  # checked by Lightning when it is iterated over
        plan,
        module.tokenizer,
        accumulate=trainer.accumulate_grad_batches,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


def loader_of(trainer: L.Trainer) -> TrainingLoader | PairedLoader | WindowedLoader:
    """Return the training loader.

    Raises:
        ValueError: If it keeps no plan.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, TrainingLoader | PairedLoader | WindowedLoader):
        raise ValueError(
            f"OnPolicyGeneration needs the loader that it has planned, not a {type(loader).__name__}; "
            "do not replace it in between, and derive a data module of yours from DistillationData"
        )
    return loader


def give_rollout(batch: Batch, rollout: Rollout) -> None:
    """Give a batch the rows of a rollout, and nothing of its own but the text of another stream.

    Replayed rows are others than the batch has: what it says of its own is not so of them.
    """
    values = cast(dict[str, Any], batch)
    for name in values.keys() - {"text"}:
        del values[name]
    values.update(copy_of(rollout))
