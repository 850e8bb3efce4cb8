"""The loop that asks a teacher about every batch and writes what it says."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.cache import CacheWriter, ShardRows, row_keys
from lightning_kd.cache_writing.options import CacheOptions
from lightning_kd.cache_writing.plan import ShardPlan
from lightning_kd.collectives import gather_objects
from lightning_kd.data import DistillationData
from lightning_kd.fused import TeacherAnswer
from lightning_kd.modules import TeacherModule
from lightning_kd.resuming import describe, tokenizer_digest
from lightning_kd.scoring import ScoredPositions
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.strategies import adapter_of
from lightning_kd.teacher_rows import as_teacher_reads
from lightning_kd.teachers import checked_answer


class Scribe:
    """What writes a cache, a batch at a time.

    Args:
        method: The method whose teacher is asked, at its positions.
        data: The texts.
        options: What is written, and where.
    """

    def __init__(
        self, method: TeacherModule, data: DistillationData, options: CacheOptions
    ) -> None:
        self.method, self._data, self._options = method, data, options
        self._payload = options.payload()
        self._writer: CacheWriter | None = None
        self._plan = ShardPlan((), 1, 1)
        self._complete: set[int] = set()
        self._seen: set[bytes] = set()
        self._group, self._rows = -1, ShardRows()
        self._known: list[bytes] = []
        self._shared: dict[str, Tensor] = {}

    @property
    def trainer(self) -> L.Trainer:
        """The trainer whose processes write."""
        return self.method.trainer

    def prepare(self, trainer: L.Trainer) -> None:
        """Prepare the teacher; the student is not built."""
        self.method.trainer = trainer
        self.method.teacher.prepare(
            self.method.tokenizer,
            self.trainer.strategy.root_device,
            self.method.vocabulary,
            adapter_of(self.trainer).shard_mesh(),
        )

    def take(self, batch: Batch, number: int, loader: int) -> int:
        """Keep the rows of a batch that have not come before, and return how many."""
        batch, positions = as_teacher_reads(batch, self.method.positions(batch))
        if self._writer is None:
            self._begin(self._answer(batch, positions), positions)
        seed = derive_seed(run_seed(), "cache", loader, number, self.trainer.global_rank)
        group = self._plan.group(loader, number)
        if group != self._group:
            self._end_shard()
            self._group, self._rows, self._known = group, ShardRows(), []
        keys = self._keys(batch, positions)
        new = _first_of(keys, self._seen)
        new_keys = [
            key for key, is_new in zip(keys, new, strict=True) if key is not None and is_new
        ]
        if group in self._complete:
            self._known += new_keys
            return 0
        if any(new) or self.method.teacher.answers_collectively:
            planes = self._planes(self._answer(batch, positions), positions, seed)
            lengths = positions.mask.sum(-1).tolist()
            chosen = torch.tensor(new)[positions.rows.cpu()]
            kept = {name: plane.cpu()[chosen] for name, plane in planes.items()}
            self._check_finite(kept, batch["row"][positions.rows].cpu()[chosen], loader)
            self._rows.add(
                new_keys,
                [length for length, is_new in zip(lengths, new, strict=True) if is_new],
                kept,
            )
        return sum(new)

    def end(self) -> None:
        """Write the last shard and, when all processes have, the manifest."""
        self._end_shard()
        gather_objects(None)
        writer = self._writing()

        def finish() -> None:
            done = writer.finish(self._shared)
            rank_zero_info(
                f"{writer.directory} is complete: {done.rows:,} texts, {done.tokens:,} positions. "
                "Train from it with model.teacher: CachedTeacher"
            )

        self._on_first_process(finish)

    def close(self) -> None:
        """Let others write to the directory."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)

    def _begin(self, answer: TeacherAnswer, positions: ScoredPositions) -> None:
        """Plan the shards by a first answer, and look at what is there; on all processes together."""
        planes = self._planes(answer, positions, seed=0)
        self._shared, layout = self._payload.shared_of(answer)
        stride = sum(p.element_size() * p.shape[1:].numel() for p in planes.values())
        loaders: Any = self.trainer.predict_dataloaders
        rows, tokens, repeats = self._count()
        self._plan = ShardPlan.of_size(
            [len(loader) for loader in loaders],
            self.trainer.world_size,
            size := tokens * stride,
            self._options.shard_megabytes * 2**20,
        )
        about = {
            "kind": self._options.kind,
            "options": self._payload.settings(),
            "planes": {n: [str(p.dtype), *p.shape[1:]] for n, p in sorted(planes.items())},
            "layout": layout,
            "vocabulary_size": self.method.teacher.vocabulary_size,
            "precision": self.trainer.precision,
            "teacher": describe(self.method.teacher),
            "tokenizer": tokenizer_digest(self.method.tokenizer),
            "data": describe(self._data),
            "files": {split: self._data.files(split) for split in self._options.splits},
            "plan": {
                "seed": run_seed(),
                "batch_size": self._data.batch_size,
                "eval_batch_size": self._data.eval_batch_size,
                "batches": list(self._plan.batches),
                "batches_per_shard": self._plan.batches_per_shard,
                "processes": self._plan.processes,
            },
        }
        if columns := sorted(self.method.teacher.columns):
            about["columns"] = columns
        about = gather_objects(about)[0]  # a description may read what differs, such as a device
        directory, shards = Path(self._options.dirpath).expanduser(), self._plan.shards
        first = self.trainer.is_global_zero
        writer = self._writer = CacheWriter(directory, about, shards, holds_lock=first)
        self._on_first_process(writer.__enter__)
        there = [number for number in range(shards) if writer.has(number)]
        self._complete = self._plan.complete_groups(there)
        gather_objects(None)  # nobody writes before all have looked
        left = size * (1 - len(self._complete) * self._plan.processes / shards)
        again = f". {repeats:,} rows repeat a text, which is kept once" if repeats else ""
        rank_zero_info(
            f"{rows:,} texts with {tokens:,} scored positions of {stride:,} bytes: "
            f"{size / 1e6:,.1f} MB in {shards} files in {directory}, of which {len(there)} are there; "
            f"{left / 1e6:,.1f} MB are still to be written"
            f"{again}"
        )
        self._on_first_process(lambda: writer.check_space(left))

    def _answer(self, batch: Batch, positions: ScoredPositions) -> TeacherAnswer:
        teacher, given = self.method.teacher, batch.get("extra", {})
        # Rows are known by no others, so none may change what is said.
        told = {name: column for name, column in given.items() if name in teacher.columns}
        try:
            return checked_answer(
                teacher,
                {**batch, "extra": told},
                positions,
                kind=self._payload.asks,
                logits_backend=self.method.logits_backend,
            )
        except KeyError as error:
            read = next(iter(error.args), None)
            if read not in given:
                raise
            raise ValueError(
                f"{type(teacher).__name__} reads the column {read!r} and does not say so, and a cache "
                "could not tell rows apart that differ in it; name it in the columns of the class"
            ) from error

    def _planes(
        self, answer: TeacherAnswer, positions: ScoredPositions, seed: int
    ) -> dict[str, Tensor]:
        width = self.method.teacher.vocabulary_size
        return self._payload.planes_of(answer, positions, width, seed)

    def _keys(self, batch: Batch, positions: ScoredPositions) -> list[bytes | None]:
        return row_keys(batch, positions, self.method.teacher.columns)

    def _check_finite(self, planes: Mapping[str, Tensor], rows: Tensor, loader: int) -> None:
        """Refuse what no run could learn from, at positions of some rows."""
        for name, plane in planes.items():
            bad = ~plane.reshape(len(rows), -1).isfinite().all(-1) if len(rows) else rows
            if bad.any():
                split = [s for s in self._options.splits if self._data.has(s)][loader]
                value = plane[bad.nonzero()[0, 0]]
                raise ValueError(
                    f"the teacher says {value[~value.isfinite()].flatten()[0].item()} about row "
                    f"{int(rows[bad][0])} of data.{split} ({name}), from which nothing can be "
                    "learned. Leave the row out, or run the teacher in bfloat16 or float32, which "
                    "do not overflow. The files that are complete stay"
                )

    def _count(self) -> tuple[int, int, int]:
        """Return texts, their scored positions and rows that repeat a text, of all processes."""
        seen: set[bytes] = set()
        counted = torch.zeros(3, dtype=torch.int64)
        for split in self._options.splits:
            for batch in self._data.texts(split):
                batch, positions = as_teacher_reads(batch, self.method.positions(batch))
                keys = self._keys(batch, positions)
                new = torch.tensor(_first_of(keys, seen))
                scored = torch.tensor([key is not None for key in keys])
                tokens = positions.mask.sum(-1)[new].sum()
                counted += torch.stack([new.sum(), tokens, (scored & ~new).sum()])
        rows, tokens_of_all, repeats = torch.stack(gather_objects(counted)).sum(0).tolist()
        return rows, tokens_of_all, repeats

    def _end_shard(self) -> None:
        if self._group < 0:
            return
        number = self._plan.shard(self._group, self.trainer.global_rank)
        if self._group in self._complete:
            self._writing().check_keys(number, self._known)
        else:
            self._writing().write(number, self._rows)

    def _writing(self) -> CacheWriter:
        assert self._writer is not None  # _begin() has made it
        return self._writer

    def _on_first_process(self, action: Callable[[], object]) -> None:
        """Do something on the first process; its error is everyone's."""
        error: OSError | ValueError | None = None
        if self.trainer.is_global_zero:
            try:
                action()
            except (OSError, ValueError) as raised:
                error = raised
        said = gather_objects(None if error is None else (type(error), error.args))[0]
        if error is not None:
            raise error
        if said is not None:
            kind, arguments = said
            raise kind(*arguments)


def _first_of(keys: Sequence[bytes | None], seen: set[bytes]) -> list[bool]:
    """Return which keys have not come before, and note them."""
    new = []
    for key in keys:
        new.append(key is not None and key not in seen)
        if key is not None:
            seen.add(key)
    return new
