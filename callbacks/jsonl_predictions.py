"""Writing of the completions of ``predict`` as JSONL that can be trained on."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.batch import FILLER_ROW, PromptBatch
from lightning_kd.callbacks.output_paths import check_output
from lightning_kd.data.generated import (
    COMPLETION_IDS,
    ENDED,
    FINGERPRINT,
    PROMPT_IDS,
    real_tokens,
    tokenizer_fingerprint,
)
from lightning_kd.generation import Completions
from lightning_kd.modules import DistillationModule


class JsonlPredictions(Callback):
    """Write one JSON object per row of ``predict``.

    Its columns: ``row``; the texts ``prompt``, ``completion`` and, if any, ``reference``;
    ``prompt_ids`` and ``completion_ids``, the tokens of prompt and completion, including a generated
    EOS; ``ended``, false if the completion was truncated at its maximum length; and
    ``tokenizer_fingerprint``, which identifies the tokenizer.
    :class:`~lightning_kd.data.PromptCompletionData` trains on these tokens, and on an EOS only if there
    is one.

    Each rank writes a part; at the end the first rank joins the parts in row order, so the file does
    not depend on the number of ranks and is never incomplete.

    Args:
        path: Output file.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._fingerprint = ""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create an empty part.

        Raises:
            ValueError: If the data is read from the output file.
        """
        assert isinstance(pl_module, DistillationModule)
        check_output(getattr(trainer, "datamodule", None), self.path, "predictions.path")
        self._fingerprint = tokenizer_fingerprint(pl_module.tokenizer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Completions,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the completions of a batch to this rank's part."""
        assert isinstance(pl_module, DistillationModule)
        texts = outputs.texts(pl_module.tokenizer)
        prompts = real_tokens(batch["prompt_ids"], batch["prompt_mask"].bool())
        completions, ended = real_tokens(outputs.ids, outputs.mask), outputs.ended.tolist()
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as file:
            for index, (row, text) in enumerate(zip(batch["row"].tolist(), texts, strict=True)):
                if row == FILLER_ROW:
                    continue
                record: dict[str, Any] = {
                    "row": row,
                    "prompt": batch["prompt"][index],
                    "completion": text,
                }
                if batch.get("completion"):
                    record["reference"] = batch["completion"][index]
                record[PROMPT_IDS] = prompts[index]
                record[COMPLETION_IDS] = completions[index]
                record[ENDED] = ended[index]
                record[FINGERPRINT] = self._fingerprint
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the parts in row order."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        lines.sort(key=lambda line: json.loads(line)["row"])
        joined = self.path.with_name(self.path.name + ".tmp")
        joined.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        joined.replace(self.path)
        for part in parts:
            part.unlink()
        rank_zero_info(f"{len(lines)} completions are in {self.path}")

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}")
