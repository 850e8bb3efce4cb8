"""Completions that the student has written earlier, to train on again."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_kd.batch import PromptBatch, Rollout, pad_rows
from lightning_kd.collectives import gather_objects
from lightning_kd.generation import Completions
from lightning_kd.generation.rollouts import Truncation, rollout_batches
from lightning_kd.modules import DistillationModule
from lightning_kd.option_checks import check_whole
from lightning_kd.resuming import Resumable
from lightning_kd.schedules import AdaptiveShare, Constant, Schedule
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.teacher_rows import teacher_rows
from lightning_kd.tokenization import padding_id

_OF_THE_DATA = frozenset({"input_ids", "attention_mask", "labels", "text", "teacher"})
"""What a row has of the data's completion, or of another stream."""

_PROMPT = ("prompt_ids", "prompt_mask")


class ReplayBuffer(Resumable):
    """Buffer of the student's own completions, from which some of its windows are taken.

    Every window that the student generates goes into it, and the oldest completions leave when there
    are more than ``capacity``. Once it is full, a window of the student is generated with probability
    ``fresh`` and otherwise taken from it: each row is one of the buffer, drawn with a random number of
    its sample, so that neither ranks nor micro-batches matter. All ranks hold the same buffer, which is
    in checkpoints.

    Args:
        capacity: Completions that it holds.
        fresh: Share of the student's windows that are generated anew, in [0, 1], or a schedule of it:
            ``Linear`` from 1 to 0 over the run is the paper's.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
        Section 3.2. https://arxiv.org/abs/2402.03898
    """

    def __init__(self, capacity: int = 1000, fresh: float | Schedule = 0.5) -> None:
        check_whole("capacity", capacity)
        self.capacity = capacity
        if isinstance(fresh, AdaptiveShare):
            raise ValueError(
                "replay.fresh is an AdaptiveShare, which hears of validations as lmbda alone; give a "
                "number, or Linear, Cosine or Steps"
            )
        self.fresh = fresh if isinstance(fresh, Schedule) else Constant(fresh)
        self.forget_run()

    def forget_run(self) -> None:
        """Begin a run, with nothing to replay."""
        self.rows: list[dict[str, Any]] = []
        """Completions with their prompts, the oldest first."""
        self.replaying = False
        """Whether the present window is from the buffer."""

    def begin(self, window: int, step: int) -> bool:
        """Return whether a window of the student is taken from the buffer; equal on all ranks."""
        coin = derive_seed(run_seed(), "replay", window) / 2**63
        self.replaying = len(self.rows) == self.capacity and coin >= self.fresh(step)
        return self.replaying

    def add(self, batches: Sequence[PromptBatch], completions: Completions) -> None:
        """Add a window that the student has generated; all ranks call this together.

        Args:
            batches: This rank's micro-batches, with prompts.
            completions: Of their rows.
        """
        own, start = [], 0
        here = completions.to(torch.device("cpu"))
        for batch in batches:
            values = move_data_to_device(dict(batch), torch.device("cpu"))
            for row in range(len(values["row"])):
                written = here.ids[start + row][here.mask[start + row]]
                own.append(_row_of(values, row, written, ended=bool(here.ended[start + row])))
            start += len(values["row"])
        everyone = [row for rows in gather_objects(own) for row in rows]
        everyone.sort(key=lambda row: int(row["sample"]))
        self.rows = [*self.rows, *everyone][-self.capacity :]

    def rollouts(
        self,
        module: DistillationModule,
        batches: Sequence[PromptBatch],
        group_size: int,
        truncation: Truncation,
    ) -> list[Rollout]:
        """Return micro-batches from the buffer, as many and as large as those of a window.

        Args:
            module: The module that is trained.
            batches: This rank's micro-batches, whose samples draw the rows.
            group_size: Completions of a prompt.
            truncation: Treatment of completions without an end.
        """
        pad_id = padding_id(module.tokenizer)
        replayed, parts = [], []
        for batch in batches:
            seeds = [derive_seed(run_seed(), "replayed", s) for s in batch["sample"].tolist()]
            rows = [self.rows[seed % len(self.rows)] for seed in seeds]
            replayed.append(move_data_to_device(_collated(rows, pad_id), module.device))
            parts.append(_completions(rows, pad_id).to(module.device))
        return rollout_batches(
            replayed,
            Completions.join(parts, pad_id),
            pad_id=pad_id,
            group_size=group_size,
            truncation=truncation,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer, the same on all ranks."""
        return {"rows": self.rows, "replaying": self.replaying}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.rows, self.replaying = state["rows"], state["replaying"]


def _row_of(values: Mapping[str, Any], row: int, written: Tensor, *, ended: bool) -> dict[str, Any]:
    """Return what is kept of a row: all that is not of the data's completion."""
    kept: dict[str, Any] = {"written": written.clone(), "ended": ended}
    kept["prompt_ids"] = values["prompt_ids"][row][values["prompt_mask"][row].bool()].clone()
    if "teacher" in values:
        told = values["teacher"]
        kept["told"] = told["prompt_ids"][row][told["prompt_mask"][row].bool()].clone()
    for name, value in values.items():
        if name in _OF_THE_DATA or name in _PROMPT:
            continue
        if isinstance(value, Mapping):
            kept[name] = {column: cells[row] for column, cells in value.items()}
        else:
            kept[name] = value[row].clone() if isinstance(value, Tensor) else value[row]
    return kept


def _collated(rows: Sequence[Mapping[str, Any]], pad_id: int) -> PromptBatch:
    """Return rows as a batch of prompts, without the completions of the data."""
    prompts = [row["prompt_ids"].tolist() for row in rows]
    batch: dict[str, Any] = {
        "prompt_ids": pad_rows(prompts, pad_id, left=True),
        "prompt_mask": pad_rows([[1] * len(ids) for ids in prompts], 0, left=True),
    }
    if "told" in rows[0]:
        told = [row["told"].tolist() for row in rows]
        batch["teacher"] = teacher_rows(told, [[] for _ in rows], pad_id)
    names = {name for row in rows for name in row}
    for name in names - {"written", "ended", "prompt_ids", "told"}:
        cells = [row[name] if name in row else _lacked(row, name) for row in rows]
        if isinstance(cells[0], Mapping):
            batch[name] = {column: [cell[column] for cell in cells] for column in cells[0]}
        else:
            batch[name] = torch.stack(cells) if isinstance(cells[0], Tensor) else cells
    return cast(PromptBatch, batch)


def _lacked(row: Mapping[str, Any], name: str) -> Any:
    """Return what a collator writes for a row that has no such field, beside one that has it."""
    if name == "references":
        return [row["completion"]]
    if name == "tokenized_apart":
        return torch.tensor(False)
    raise ValueError(
        f"on_policy.replay joins rows of several batches, and some of these have {name} while others "
        "have not; give it in every batch, or leave replay out"
    )


def _completions(rows: Sequence[Mapping[str, Any]], pad_id: int) -> Completions:
    written = [row["written"].tolist() for row in rows]
    ids, mask = pad_rows(written, pad_id), pad_rows([[1] * len(each) for each in written], 0).bool()
    return Completions(ids, mask, None, None, torch.tensor([row["ended"] for row in rows]))
