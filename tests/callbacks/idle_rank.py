"""Runs that reach every collective of the library with one rank that has no data.

A script of its own, as a user would start it: ``python idle_rank.py OUT STRATEGY``, with ``ddp``,
``fsdp2`` or a name of ``tests.support.cpu_strategies``. A rank that waits in vain gives up after two
minutes. With ``alone`` instead of a strategy, one process has all rows.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torchmetrics.text import BLEUScore

from lightning_kd.callbacks import (
    CompletionSamples,
    HFExport,
    JsonlPredictions,
    LossNormalizationDiagnostics,
    NonFiniteGuard,
    OnPolicyGeneration,
    SaveOnTermination,
)
from lightning_kd.evaluation import DistinctN, ExactMatch, Repetition, RougeL
from lightning_kd.fused import WeightedSum
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import (
    GKD,
    SFT,
    BabyLlama,
    MiniLLM,
    OnPolicyDistillation,
    RLDistillation,
    SequenceKD,
    SupervisedKD,
)
from lightning_kd.modules.loss import LossTerm
from lightning_kd.rewards import exact_match
from lightning_kd.strategies import FSDP2Strategy
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.support.cpu_strategies import STRATEGIES
from tests.support.harness import BatchList, Letters, Listed, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

# pytest imports this file too, for its doctests, with arguments of its own.
GIVEN = sys.argv[1:] if __name__ == "__main__" else ["", "alone"]
OUT, STRATEGY = Path(GIVEN[0]), GIVEN[1]
RANK = int(os.environ.get("LOCAL_RANK", "0"))
WAIT = timedelta(minutes=2)
ROWS, NOTHING = ragged_batch([(2, 5), (1, 3), (3, 4)]), ragged_batch([(3, 0), (2, 0), (4, 0)])


def strategy() -> Any:
    """Return a new strategy for each trainer."""
    if STRATEGY == "alone":
        return "auto"
    if STRATEGY == "fsdp2":
        return FSDP2Strategy(process_group_backend="gloo", timeout=WAIT)
    if STRATEGY in STRATEGIES:
        return STRATEGIES[STRATEGY]()  # type: ignore[no-untyped-call]
    return DDPStrategy(process_group_backend="gloo", timeout=WAIT)


def run(case: str, callbacks: list[Callback] = [], **settings: Any) -> Any:  # noqa: B006
    """Return a trainer with loggers and checkpoints of its own."""
    directory = OUT.parent / STRATEGY / case
    loggers = [CSVLogger(directory, name="csv"), TensorBoardLogger(directory, name="board")]
    defaults = {
        "devices": 1 if STRATEGY == "alone" else 2,
        "strategy": strategy(),
        "logger": loggers,
        "limit_val_batches": 1.0,
    }
    return trainer(callbacks=callbacks, **(defaults | settings))


def on_rank_0(batch: Any) -> list[Any]:
    """Return the batch on the first rank, and one without labels on the second."""
    return [batch if RANK == 0 else NOTHING]


def two(placement: str = "replicated") -> dict[str, Any]:
    """Return a student and a teacher."""
    teacher = LocalTeacher.of(tiny_llama(1), placement=placement)
    return {"student": StudentSpec.of(tiny_llama(0)), "teacher": teacher}


def in_shards() -> str:
    """Return the placement of a teacher when as many weights as possible are sharded."""
    return "sharded" if STRATEGY == "fsdp2" else "replicated"


def numbers(fit: Any, *prefixes: str) -> dict[str, float]:
    """Return the logged metrics of these names."""
    logged = fit.callback_metrics
    return {k: v.item() for k, v in logged.items() if k.startswith(prefixes or ("val/", "train/"))}


def every_metric() -> list[Any]:
    """Return metrics of sums, of joined lists, and of torchmetrics."""
    metrics = [ExactMatch(), RougeL(), DistinctN(), Repetition(2), BLEUScore(n_gram=1)]
    return [*metrics, letters]


def letters(completion: str, references: list[str]) -> float:
    """Count the letters of a completion."""
    return float(len(completion))


def only_fillers() -> dict[str, float]:
    """Complete and score validation rows that only the first rank has."""
    fit = run("fillers", [CompletionSamples(max_new_tokens=4, metrics=every_metric())])
    fit.validate(SupervisedKD(**two()), datamodule=Letters(rows=3, batch_size=3), verbose=False)
    return numbers(fit)


def no_batch() -> dict[str, float]:
    """Train on data of unknown length that ends before the second rank has any."""

    class Endless(Listed):
        __len__ = None  # type: ignore[assignment]

    class Data(BatchList):
        def val_dataloader(self) -> Any:
            return Endless([with_prompts(ROWS)] if RANK == 0 else [])

    fit = run("no_batch", [CompletionSamples(max_new_tokens=4, metrics=every_metric())])
    module = SupervisedKD(**two())
    fit.validate(module, datamodule=Data([]), verbose=False)
    return numbers(fit)


def nothing_scored() -> dict[str, float]:
    """Take an optimizer step with all diagnostics, then a checkpoint and an export."""
    directory = OUT.parent / STRATEGY / "masked"
    callbacks: list[Callback] = [
        LossNormalizationDiagnostics(histograms_every=1),
        NonFiniteGuard(),
        SaveOnTermination(),
        ModelCheckpoint(dirpath=directory, every_n_train_steps=1),
        HFExport(dirpath=str(directory / "student")),
    ]
    fit = run("masked", callbacks, enable_checkpointing=True, gradient_clip_val=0.1, max_steps=1)
    fit.fit(SupervisedKD(**two()), datamodule=BatchList(on_rank_0(ROWS), [ROWS]))
    return numbers(fit, "train/", "norm/")


def baby_llama() -> dict[str, float]:
    """Take a step whose second count is summed in advance, and validate on fillers."""
    sources = [LocalTeacher.of(tiny_llama(seed), placement=in_shards()) for seed in (1, 2)]
    module = BabyLlama(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=TeacherEnsemble(sources),
        kl_scale="batchmean",
    )
    fit = run("baby_llama", max_steps=1)
    data = BatchList(on_rank_0(ROWS), on_rank_0(ROWS))
    fit.fit(module, datamodule=data)
    return numbers(fit)


def in_fp16() -> dict[str, float]:
    """Scale the loss by a power of two in half precision."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit = run("fp16", plugins=[plugin], max_steps=1)
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    fit.fit(module, datamodule=BatchList(on_rank_0(ROWS), [ROWS]))
    return {"largest": module._sum_scale.largest, "scale": plugin.scaler.get_scale()}


def not_finite() -> dict[str, float]:
    """Take steps with a non-finite loss on the second rank."""

    class Broken(SFT):
        def loss_terms(self, batch: Any, scores: Any) -> Any:
            terms = super().loss_terms(batch, scores)
            factor = float("nan") if RANK == 1 or STRATEGY == "alone" else 1.0
            ((name, term),) = terms.items()
            return {name: LossTerm(WeightedSum((term.per_token, factor)))}

    guard = NonFiniteGuard("skip", dirpath=str(OUT.parent / STRATEGY / "non_finite"))
    fit = run("not_finite", [guard], max_steps=1)
    fit.fit(Broken(student=StudentSpec.of(tiny_llama(0))), datamodule=BatchList([ROWS], [ROWS]))
    return {"skipped": float(guard.skipped)}


def rollouts(method: str, truncated: str) -> Callable[[], dict[str, float]]:
    """Train on windows whose completions are all truncated, or not; write files and tables."""

    def case() -> dict[str, float]:
        directory = OUT.parent / STRATEGY / f"{method}-{truncated}"
        grouped = method == "rl"
        callback = OnPolicyGeneration(
            generation=SamplingOptions(max_new_tokens=2),
            truncated=truncated,  # type: ignore[arg-type]
            group_size=2 if grouped else 1,
            path=str(directory / "rollouts.jsonl"),
            table_every=1,
        )
        rewards = {"rewards": [exact_match]} if grouped else {}
        kind: Any = {
            "gkd": GKD,
            "minillm": MiniLLM,
            "on_policy": OnPolicyDistillation,
            "rl": RLDistillation,
        }[method]
        steps = [callback, LossNormalizationDiagnostics(histograms_every=1)]
        fit = run(f"{method}-{truncated}", steps, max_steps=3, max_epochs=-1, limit_val_batches=0)
        fit.fit(
            kind(**two(in_shards()), **rewards),
            datamodule=Letters(rows=8, batch_size=4 if STRATEGY == "alone" else 2),
        )
        return numbers(fit, "train/loss", "train/tokens", "rollout/length", "rollout/eos")

    return case


def predictions(kind: Any) -> Callable[[], dict[str, float]]:
    """Predict a single row with the student or its teacher: the second rank has fillers."""

    def case() -> dict[str, float]:
        path = OUT.parent / STRATEGY / f"{kind.__name__}.jsonl"
        fit = run("predict", [JsonlPredictions(str(path))])
        teacher = {} if kind is SFT else {"teacher": two(in_shards())["teacher"]}
        module = kind(student=StudentSpec.of(tiny_llama(0)), **teacher)
        data = Letters(rows=1, batch_size=2)
        fit.predict(module, datamodule=data, return_predictions=False)
        return {"lines": float(len(path.read_text().splitlines()))} if RANK == 0 else {}

    return case


def own_clocks() -> dict[str, float]:
    """Validate by time, which has elapsed on the first rank only."""

    class Clocks(Callback):
        validations = 0

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            trainer._last_val_time += 1e6 if RANK == 1 else -1e6

        def on_validation_end(self, *_: Any) -> None:
            self.validations += 1

    clocks = Clocks()
    fit = run("clocks", [clocks], max_steps=3, max_epochs=-1, val_check_interval="00:01:00:00")
    data = Letters(rows=4, batch_size=2 if STRATEGY == "alone" else 1)
    fit.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=data)
    return {"validations": float(clocks.validations)} | numbers(fit, "val/")


METHODS = ("gkd", "minillm", "on_policy", "rl")


def cases() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Return all cases by name."""
    yield "only fillers", only_fillers
    yield "nothing scored", nothing_scored
    yield "baby llama", baby_llama
    for method in METHODS:
        yield f"{method} drop", rollouts(method, "drop")
    if STRATEGY in STRATEGIES:
        return
    if STRATEGY != "fsdp2":  # in shards, no rank computes alone, whatever the library does
        yield "no batch", no_batch
    yield "own clocks", own_clocks
    yield "fp16", in_fp16
    yield "not finite", not_finite
    for method in METHODS:
        for truncated in ("keep", "mask"):
            yield f"{method} {truncated}", rollouts(method, truncated)
    for kind in (SFT, SequenceKD):
        yield f"predictions of {kind.__name__}", predictions(kind)


def main() -> None:
    """Run all cases; the first rank saves the logged metrics."""
    warnings.simplefilter("ignore")
    results = {name: case() for name, case in cases()}
    if RANK == 0:
        torch.save(results, OUT)


if __name__ == "__main__":
    main()
