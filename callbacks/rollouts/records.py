"""Writing of generated completions to a JSONL file and to a table in loggers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_kd.batch import Rollout
from lightning_kd.callbacks.output_paths import check_output
from lightning_kd.callbacks.rollouts.statistics import passes_multiple
from lightning_kd.callbacks.text_tables import log_table, loggers_of_tables
from lightning_kd.collectives import gather_objects
from lightning_kd.data.generated import (
    COMPLETION_IDS,
    ENDED,
    FINGERPRINT,
    PROMPT_IDS,
    real_tokens,
    tokenizer_fingerprint,
)
from lightning_kd.generation import completion_texts, evaluating
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.strategies import adapter_of


class RolloutRecords:
    """Writer of generated completions to a file and to loggers that show tables.

    Args:
        table_every: Optimizer steps between tables; 0 for none.
        table_rows: Rows of a table.
        path: JSONL file; None for none.
    """

    def __init__(self, table_every: int, table_rows: int, path: Path | None) -> None:
        if table_rows < 1:
            raise ValueError(f"table_rows is {table_rows}; it must be 1 or more")
        self.table_every, self.table_rows, self.path = table_every, table_rows, path
        self.forget_run()

    def forget_run(self) -> None:
        """Begin a run, which opens the file anew."""
        self._opened, self.resumed = False, False

    def check(self, trainer: L.Trainer) -> None:
        """Validate that the file can be written without losing another.

        Raises:
            ValueError: If this run reads it, or it has the completions of a run that does not go on.
        """
        if self.path is None:
            return
        check_output(getattr(trainer, "datamodule", None), self.path, "on_policy.path")
        if not self.resumed and self.path.exists() and self.path.stat().st_size > 0:
            raise ValueError(
                f"on_policy.path is {str(self.path)!r}, which exists, and this run goes on from no "
                "checkpoint: choose another file, or remove it"
            )

    def write(
        self,
        trainer: L.Trainer,
        module: DistillationModule,
        rollouts: Sequence[Rollout],
        ended: list[bool],
        window: int,
    ) -> None:
        """Append a window's completions of all ranks, in the order of their samples."""
        if self.path is None:
            return
        rows = [row for batch in rollouts for row in _records(batch, module, window)]
        fingerprint = tokenizer_fingerprint(module.tokenizer)
        for row, has_ended in zip(rows, ended, strict=True):
            row |= {ENDED: has_ended, FINGERPRINT: fingerprint}
        ranks = gather_objects(rows)
        if trainer.is_global_zero:
            if not self._opened:
                self._open(window)
            everyone = sorted((row for rows in ranks for row in rows), key=lambda r: r["sample"])
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in everyone)

    def _open(self, window: int) -> None:
        """Create the file, or remove the windows of an earlier run that this run generates again.

        Raises:
            ValueError: If a line is no record.
        """
        assert self.path is not None  # write() checks
        self._opened = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")
        lines.pop()  # what stands behind the last line's end: of a run that was killed, half a line
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                if json.loads(line)["window"] < window:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is no record of a completion with its window; give "
                    "on_policy.path another file, or remove the line"
                ) from error
        fresh = self.path.with_name(f".{self.path.name}.fresh")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(self.path)  # at once: what was written before outlives a kill

    def log_table(self, trainer: L.Trainer, module: TeacherModule, batch: Rollout) -> None:
        """Log a table of the first rows with the reverse KL of every token, if it is due."""
        step = trainer.global_step
        if not loggers_of_tables(trainer) or not passes_multiple(step - 1, step, self.table_every):
            return
        first: Rollout = {**batch}
        for name in ("input_ids", "attention_mask", "labels", "completion_mask", "row"):
            first[name] = batch[name][: self.table_rows]
        first["extra"] = {k: v[: self.table_rows] for k, v in batch.get("extra", {}).items()}
        context = trainer.precision_plugin.forward_context()
        with adapter_of(trainer).outside_of_steps(), evaluating(module.student), context:
            name, values = module.token_reverse_kl(first)
            rows = module.positions(first).rows
        cells = []
        texts = completion_texts(first, module.tokenizer)
        for number, text in enumerate(texts):
            labeled = first["input_ids"][number][first["labels"][number] >= 0]
            tokens = [module.tokenizer.decode([token]) for token in labeled.tolist()]
            pairs = zip(tokens, values[rows == number].tolist(), strict=True)
            per_token = " ".join(f"{token}:{value:.2f}" for token, value in pairs)
            cells.append((batch["prompt"][number], text, per_token))
        shown = name.replace("_kl", " KL").replace("_", " ")
        header = ("prompt", "completion", f"{shown} per token")
        log_table(trainer, "rollout/samples", header, cells, step - 1)


def _records(batch: Rollout, module: DistillationModule, window: int) -> list[dict[str, Any]]:
    generated = batch["completion_mask"]
    # Neither padding nor completion.
    prompts = real_tokens(batch["input_ids"], batch["attention_mask"].bool() & ~generated)
    return [
        {
            "window": window,
            "sample": sample,
            "row": row,
            "prompt": prompt,
            "completion": text,
            PROMPT_IDS: prompt_ids,
            COMPLETION_IDS: completion_ids,
        }
        for sample, row, prompt, text, prompt_ids, completion_ids in zip(
            batch["sample"].tolist(),
            batch["row"].tolist(),
            batch["prompt"],
            completion_texts(batch, module.tokenizer),
            prompts,
            real_tokens(batch["input_ids"], generated),
            strict=True,
        )
    ]
