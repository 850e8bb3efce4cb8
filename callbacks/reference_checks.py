"""What a metric of completions cannot be computed with, said before anything is generated."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Literal

import lightning as L
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_mean

from lightning_kd.batch import has_prompts, references_of
from lightning_kd.collectives import gather_objects
from lightning_kd.data import DistillationData
from lightning_kd.evaluation import CompletionMetric, check_references, metric_name
from lightning_kd.evaluation.completion_metric import failed
from lightning_kd.evaluation.given_metrics import OneReference


def check_states(metrics: Sequence[Metric], world_size: int) -> None:
    """Refuse metrics that several processes cannot compute together.

    Args:
        metrics: Metrics of completions.
        world_size: Processes of the run.

    Raises:
        ValueError: If one has a list that is not joined, for which a process without a completion
            would be waited for forever, a mean, which is not that of all completions, or is told not
            to add up over processes.
    """
    parts = [(m, part) for m in metrics for part in m.modules() if isinstance(part, Metric)]
    for metric, part in parts if world_size > 1 else ():
        if not part.sync_on_compute:
            raise ValueError(
                f"{metric_name(metric)} has sync_on_compute=False, so each of {world_size} processes "
                "would compute a number of its own completions; leave sync_on_compute out, or compute "
                "it in one process (--trainer.devices 1)"
            )
        for state, reduction in part._reductions.items():
            listed = reduction is None and isinstance(part._defaults[state], list)
            if listed or reduction is dim_zero_mean:
                raise ValueError(
                    f"{metric_name(metric)} keeps {state} in a way that {world_size} processes do not "
                    "add up right; compute it in one (--trainer.devices 1), or write a metric whose "
                    'states are sums: add_state(..., dist_reduce_fx="sum")'
                )


def check_works(metrics: Sequence[Metric]) -> None:
    """Measure one text by each metric of torchmetrics, some of which need what is not installed.

    Args:
        metrics: Metrics of completions.

    Raises:
        ValueError: If one fails.
    """
    for metric in metrics:
        inner = metric.metric if isinstance(metric, OneReference) else metric
        if not type(inner).__module__.startswith("torchmetrics."):
            continue
        try:
            deepcopy(metric).update(["one text"], [["one text"]])
        except Exception as error:
            said = next((line for line in f"{error}".splitlines() if line.strip(" *")), "")
            hint = (
                "; its rougeLsum needs punkt of nltk: python -m nltk.downloader punkt punkt_tab, or "
                "name other rouge_keys"
                if metric_name(metric) == "ROUGEScore"
                else ""
            )
            raise ValueError(
                f"{metric_name(metric)} cannot measure a text here ({type(error).__name__}: "
                f"{said.strip():.200}){hint}"
            ) from error


def measure(
    metric: Metric, completions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Add completions to a metric.

    Raises:
        ValueError: If it fails for them, with the first.
    """
    try:
        metric.update(completions, references)
    except ValueError:
        raise
    except Exception as error:
        raise failed(metric, completions[0] if completions else "", error) from error


def check_data(
    metrics: Sequence[Metric],
    trainer: L.Trainer,
    split: Literal["validation", "test"],
    batches: int,
) -> None:
    """Validate the references of the rows that will be completed, on all processes together.

    Data of a user's own loader shows its references as they come.

    Args:
        metrics: Metrics of completions.
        trainer: Has the data.
        split: Whose rows.
        batches: Number of evaluation batches of each process; -1 for all.

    Raises:
        ValueError: If a metric cannot be computed with one of them, on any process.
    """
    data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, DistillationData):
        return
    said = None
    try:
        for references in _references(data, split, None if batches == -1 else batches):
            for metric in metrics:
                if isinstance(metric, CompletionMetric):
                    metric.check_references(references)
                else:
                    check_references(metric, references)
    except ValueError as error:
        said = f"data.{split}: {error}"
    for refused in gather_objects(said):
        if refused is not None:
            raise ValueError(refused)


def _references(
    data: DistillationData, split: Literal["validation", "test"], batches: int | None
) -> Iterator[list[list[str]]]:
    left = None if batches is None else batches * data.eval_batch_size
    for batch in data.texts(split):
        if not has_prompts(batch) or left == 0:
            return
        references = references_of(batch)[:left]
        left = None if left is None else left - len(references)
        yield references
