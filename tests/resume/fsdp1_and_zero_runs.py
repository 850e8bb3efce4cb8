"""What two processes under FSDP1 or ZeRO write and read: ``fsdp1_and_zero_runs.py OUT STRATEGY``.

Student-written GKD of four optimizer steps; the same from the checkpoint of the second; a step that is
not finite; directories that would run something, and that are incomplete.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_kd.callbacks import HFExport, NonFiniteGuard
from lightning_kd.integrity import ABOUT, checksums, read_about, write_about
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.strategies import adapter_of
from lightning_kd.teachers import LocalTeacher
from tests.modules.fsdp1_and_zero_grid import adamw
from tests.modules.partition_grid import writing
from tests.support.cpu_strategies import STRATEGIES
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama


class Losses(Callback):
    """The exact losses of a run."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.callback_metrics["train/loss"].item().hex())


class Poison(Callback):
    """A loss that is not a number on the second rank, at the second step."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step = type(pl_module).training_step

        def poisoned(batch: Any, batch_idx: int) -> torch.Tensor:
            total = step(pl_module, batch, batch_idx)
            return total * float("nan") if trainer.global_rank == 1 else total

        if batch_idx == 1:
            pl_module.training_step = poisoned


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def fit(
    strategy: str,
    *callbacks: Callback,
    resume: Path | None = None,
    student: Any = None,
    **settings: Any,
) -> Any:
    """Losses and last weights of a run, and a loss of what it has trained."""
    module = GKD(
        student=StudentSpec.of(student or tiny_llama(0, attention_dropout=0.2)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        optimizer=adamw,
    )
    losses = Losses()
    defaults = {"devices": 2, "precision": "32-true", "max_steps": 4, "max_epochs": -1}
    windows = {"steps_per_window": 4, "table_every": 1, "truncated": "keep"}
    run = trainer(
        strategy=STRATEGIES[strategy](),
        callbacks=[writing("gkd", **windows), losses, *callbacks],
        **(defaults | settings),
    )
    data = Letters(batch_size=2)
    run.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    weights = adapter_of(run).full_state_dict(module.student)
    (tested,) = run.test(module, datamodule=data, verbose=False)
    return losses.seen, weights, tested["test/loss"]


def refusal(strategy: str, **settings: Any) -> str:
    """What a run says that does not start."""
    try:
        fit(strategy, **settings)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    """All runs; the first rank writes down what came out."""
    warnings.simplefilter("ignore")
    out, name = Path(sys.argv[1]), sys.argv[2]
    guard = NonFiniteGuard("skip", dirpath=str(out.parent / "bad"))
    keep = ModelCheckpoint(out.parent, "{step}", every_n_train_steps=1, save_top_k=-1)
    logger = TensorBoardLogger(out.parent, name="")
    export = HFExport(str(out.parent / "student"))
    results = {
        "whole": fit(name, keep, export, enable_checkpointing=True, logger=logger),
        "resumed": fit(name, resume=out.parent / "step=2.ckpt"),
        "one_step": fit(name, max_steps=1),
        "poisoned": fit(name, guard, Poison(), max_steps=2),
        "skipped": guard.skipped,
        "other": refusal(
            name, resume=out.parent / "step=2.ckpt", student=tiny_llama(0, hidden_size=8)
        ),
    }
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    evil = out.parent / "step=3.ckpt"
    if first:
        shards = "meta.pt" if name == "fsdp" else "checkpoint/zero_pp_rank_0*optim_states.pt"
        (file,) = evil.glob(shards)
        torch.save(Payload(out.parent / "executed"), file)
        if name == "fsdp":
            # Whoever writes a hostile directory writes its checksums, too. Of ZeRO's files each is
            # read by one process, and here the other one would wait for it.
            write_about(evil, read_about(evil) | {"checksums": checksums(evil)})
        (out.parent / "step=1.ckpt" / ABOUT).unlink()
    results["incomplete"] = refusal(name, resume=out.parent / "step=1.ckpt")
    results["evil"] = refusal(name, resume=evil)
    if first:
        torch.save(results, out)


if __name__ == "__main__":
    main()
