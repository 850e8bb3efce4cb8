"""Position of a run in its epochs, and Lightning's counters for it."""

from dataclasses import dataclass
from typing import Any

import lightning as L

from lightning_kd.loops.fit import TRAINED, VALIDATED, EpochLoader


@dataclass(frozen=True)
class Place:
    """Position in its epochs at which a run continues.

    Attributes:
        epoch: The epoch, from 0.
        done: Micro-batches of the epoch that were processed.
        of_run: Micro-batches of the run that were processed.
        under_way: Whether the epoch has begun.
        complete: Whether the last micro-batch was the epoch's last.
        pending: The moment to continue from.
    """

    epoch: int
    done: int
    of_run: int
    under_way: bool
    complete: bool
    pending: str

    def counters(self, loops: dict[str, Any]) -> dict[str, Any]:
        """Return Lightning's counters at this position; ``loops`` holds those of the checkpoint."""
        begun = self.epoch + self.under_way
        epochs = _tracker(self.epoch) | {"ready": self.epoch + 1, "started": begun}
        validated = loops["epoch_loop.val_loop.batch_progress"]["total"]["completed"]
        return {
            "epoch_progress": {"total": epochs, "current": dict(epochs)},
            "epoch_loop.batch_progress": {
                "total": _tracker(self.of_run),
                "current": _tracker(self.done),
                "is_last_batch": self.under_way and self.complete,
            },
            "epoch_loop.val_loop.batch_progress": {
                "total": _tracker(validated),
                "current": _tracker(0),
                "is_last_batch": False,
            },
        }


def place_of(
    trainer: L.Trainer, record: dict[str, Any] | None, loops: dict[str, Any], global_step: int
) -> Place:
    """Return where a checkpoint was saved, in micro-batches of this run."""
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    now, finished = batches["current"], epochs["processed"]
    states = loops["state_dict"].get("combined_loader", [])
    loader = _loader_at(trainer, states[0] if len(states) == 1 else {})
    if record is None:
        return _without_record(trainer, loader, loops, global_step)
    per_micro_batch = record["samples_per_micro_batch"]

    def here(count: int) -> int:
        if loader is None or per_micro_batch is None:
            return count
        return count * int(per_micro_batch) // loader.samples_per_micro_batch

    under_way = epochs["started"] > finished
    cut_short = not under_way and now["processed"] > 0 and not record["epoch_complete"]
    going_on = under_way or cut_short
    return Place(
        # Lightning counts an epoch that max_steps has cut short; a longer run goes on inside it.
        epoch=finished - cut_short,
        done=here(now["processed"]) if going_on else 0,
        of_run=here(batches["total"]["processed"]),
        under_way=going_on,
        complete=record["epoch_complete"],
        pending="" if cut_short else record["moment"],
    )


def _without_record(
    trainer: L.Trainer, loader: EpochLoader | None, loops: dict[str, Any], global_step: int
) -> Place:
    """Return the position of a checkpoint without a record, as an older version wrote it.

    Raises:
        ValueError: If it is from the inside of an optimizer step.
    """
    batches, micro_batches = loops["epoch_loop.batch_progress"], trainer.accumulate_grad_batches
    done, complete = batches["current"]["processed"], batches["is_last_batch"]
    of_run, epoch = batches["total"]["processed"], loops["epoch_progress"]["current"]["processed"]
    inside = bool(done % micro_batches) and not complete
    if loader is not None and loader.position > 0:  # the run was one epoch then
        of_run = loader.position
        inside = of_run != global_step * micro_batches
        epoch = loader.epoch_of(of_run - 1)
        done, complete = of_run - loader.start_of(epoch), of_run == loader.start_of(epoch + 1)
    if inside:
        raise ValueError(
            f"the checkpoint was saved inside an optimizer step: {of_run} micro-batches had been "
            f"trained on in {global_step} steps of {micro_batches}, and the gradient in between "
            "is lost. Go on from another one, with the same batch_size x processes x "
            "accumulate_grad_batches"
        )
    in_hooks = batches["current"]["completed"] < batches["current"]["processed"]
    return Place(epoch, done, of_run, done > 0, complete, TRAINED if in_hooks else VALIDATED)


def _loader_at(trainer: L.Trainer, state: dict[str, Any]) -> EpochLoader | None:
    """Return this run's loader at the position of a checkpoint, if both are of this library.

    Raises:
        ValueError: If it cannot go on there.
    """
    data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if not {"samples", "main"} & state.keys() or data is None:
        return None
    loader = data.train_dataloader()
    if not isinstance(loader, EpochLoader):
        return None
    loader.load_state_dict(state)
    return loader


def _tracker(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "completed", "started", "processed"), count)
