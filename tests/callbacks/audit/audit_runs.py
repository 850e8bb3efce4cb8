"""Audits of modules with planted faults and of correct ones, in one and in two processes."""

import json
import logging
import os
import random
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.callbacks.audit.gradient_audit import audit_window
from lightning_kd.collectives import gather_objects
from tests.callbacks.audit.audited_modules import (
    CORRECT,
    PLANTED,
    THREE,
    Case,
    Everything,
    OneOverWorldSize,
    Reduced,
)
from tests.support.harness import BatchList, trainer
from tests.support.scripts import free_port, rank_variables


@dataclass(frozen=True)
class Outcome:
    """Results of an audit."""

    differences: dict[str, float]
    causes: list[str]
    warnings: list[str]
    notes: str


def audit(case: Case) -> Outcome:
    """Train the module of a case for a step, and audit it."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    batches = list(case.batches)
    if case.processes == 2:
        # Six micro-batches, of which each process takes half, of other lengths.
        batches = [*batches, *reversed(batches)][rank :: case.processes]
    callback = LossNormalizationDiagnostics(histograms_every=0, audit="first")
    fit = trainer(
        max_steps=1,
        accumulate_grad_batches=case.accumulate,
        callbacks=[callback],
        devices=case.processes,
        strategy="ddp" if case.processes == 2 else "auto",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit.fit(case.build(), datamodule=BatchList(batches))
        except ValueError as error:
            return Outcome({}, [], [f"refused: {error}"], "")
    messages = [str(w.message) for w in caught if "the gradient of step" in str(w.message)]
    report = callback.audit.report
    assert report is not None
    notes = "" if messages or not report.depends_on_partitioning else report.message(1)
    return Outcome(report.differences, report.causes, messages, notes)


def audit_two_processes() -> dict[str, list[Any]]:
    """Run all cases of two processes in one group; return the results of each process by name."""
    with tempfile.TemporaryDirectory() as folder:
        start = torch.multiprocessing.start_processes
        start(_process, (free_port(), folder), nprocs=2, start_method="forkserver")
        both = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [found[name] for found in both] for name in both[0]}


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= rank_variables(rank, 2, port)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = [case for case in [*PLANTED, *CORRECT] if case.processes == 2]
    found: dict[str, Any] = {case.name: asdict(audit(case)) for case in cases}
    found |= {f"trace audited {kept}": trace(kept, two_processes=True) for kept in (True, False)}
    found["windows of 1 and 0"] = _audit_directly([THREE[0]][: 1 - rank])
    found["rows of 2 and 0"] = _audit_directly([pick_rows(THREE[0], 2 * (1 - rank))])
    found["rows of 2 and 1"] = _audit_directly([pick_rows(THREE[1], 2 - rank)])
    found["rows of 0 and 0"] = _audit_directly([pick_rows(THREE[0], 0)])
    found["raised"] = _raised()
    found["gathered"] = gather_objects({"rank": rank, "prompt": "x" * rank})
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def pick_rows(batch: Any, rows: int) -> Any:
    return {name: tensor[:rows] for name, tensor in batch.items()}


class _Directly(L.Callback):
    """Audit of a given window after the first step."""

    def __init__(self, window: list[Any]) -> None:
        self.window = window

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.report = audit_window(trainer, pl_module, self.window)


def _audit_directly(window: list[Any]) -> dict[str, Any]:
    callback = _Directly(window)
    fit = trainer(max_steps=1, callbacks=[callback], devices=2, strategy="ddp")
    fit.fit(Reduced(), datamodule=BatchList(THREE))
    return asdict(callback.report) | {"is_fault": callback.report.is_fault}


def _raised() -> str:
    callback = LossNormalizationDiagnostics(histograms_every=0, audit="first", on_fault="raise")
    fit = trainer(max_steps=1, callbacks=[callback], devices=2, strategy="ddp")
    try:
        fit.fit(OneOverWorldSize(), datamodule=BatchList(THREE))
    except ValueError as error:
        return str(error)
    return ""


class Trace(L.Callback):
    """Record of all that an audit might change, before and after every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Any, module: Any) -> None:
        tensors = [*module.parameters(), *module.buffers(), *getattr(module, "held", [])]
        tensors += [p.grad for p in module.parameters() if p.grad is not None]
        tensors += [
            value for state in trainer.optimizers[0].state.values() for value in state.values()
        ]
        tensors += [torch.get_rng_state()]
        numbers = [
            [tensor.detach().flatten().tolist() for tensor in tensors],
            [p.grad is None for p in module.parameters()],
            np.random.get_state()[1].tolist(),
            random.getstate(),
            {k: v.item() for k, v in trainer.callback_metrics.items() if "norm/" not in k},
            [m.training for m in module.modules()],
            sorted(name for name in module.__dict__ if name != "training_step"),  # recorded there
            [group["lr"] for group in trainer.optimizers[0].param_groups],
            (trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.should_stop),
            trainer.fit_loop.epoch_loop.batch_progress.state_dict(),
            module.state() if hasattr(module, "state") else None,
        ]
        self.seen.append(repr(numbers))


def trace(audited: bool, module: Any = None, *, two_processes: bool = False) -> list[str]:
    """Train for three steps of two micro-batches, audited in every step or not at all."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for seeds in (torch.manual_seed, np.random.seed, random.seed):
        seeds(3)
    Everything.calls = 0
    Everything.lengths.clear()
    seen = Trace()
    audits = [LossNormalizationDiagnostics(audit=1)] if audited else []
    fit = trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=[*audits, seen],
        devices=2 if two_processes else 1,
        strategy="ddp" if two_processes else "auto",
    )
    batches = [*THREE, *reversed(THREE)] if rank == 0 else [*reversed(THREE), *THREE]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradient of step")
        fit.fit(Everything() if module is None else module, datamodule=BatchList(batches))
    return seen.seen
