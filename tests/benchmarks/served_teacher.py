"""Seconds of a step with the teacher in the process, and with the same teacher served beside it.

``python -m tests.benchmarks.served_teacher [steps]``; the rounds alternate, and medians are shown.
"""

import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.data import train_tokenizer
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, ServedTeacher
from tests.support.harness import BatchList, Listed, trainer
from tests.support.servers import serving
from tests.support.toys import ragged_batch

VOCABULARY, ROWS, LENGTH = 8192, 8, 128
WAYS = {
    "local": None,
    "served, hidden states": {},
    "served, hidden states, not asked ahead": {},
    "served, top 64": {"payload": "top_k", "k": 64},
}


class Foresighted(Listed):
    """Batches of which the next one is known, as those of a data module of the library."""

    def following(self):
        return self.batches[self.position] if self.position < len(self.batches) else None


class Clock(Callback):
    """Seconds from one step to the next."""

    def __init__(self):
        self.times = []

    def on_train_batch_end(self, *_):
        self.times.append(time.perf_counter())

    @property
    def seconds(self):
        return [b - a for a, b in zip(self.times[2:], self.times[3:], strict=False)]


def llama(hidden, layers, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
    )


def main(steps):
    folder = Path(tempfile.mkdtemp()) / "teacher"
    llama(256, 6, 1).save_pretrained(folder)
    tokenizer = train_tokenizer(["two and two is four"] * 3, vocab_size=270)
    tokenizer.save_pretrained(folder)
    batches = [
        ragged_batch([(16, LENGTH - 16)] * ROWS, seed, VOCABULARY) for seed in range(steps + 4)
    ]
    with serving(folder) as url:
        seconds = {name: [] for name in WAYS}
        for _ in range(3):
            for name, options in WAYS.items():
                teacher = LocalTeacher(str(folder))
                if options is not None:
                    teacher = ServedTeacher([url], **options)
                clock = Clock()
                module = SupervisedKD(student=StudentSpec.of(llama(128, 2, 0)), teacher=teacher)
                data = BatchList(batches)
                data.tokenizer = tokenizer
                known = Listed if "not asked" in name else Foresighted
                data.train_dataloader = partial(known, batches)
                trainer(max_steps=steps, callbacks=[clock]).fit(module, datamodule=data)
                seconds[name] += clock.seconds
        scored = len(ScoredPositions.from_labels(batches[0]["labels"]).targets)
        sizes = {"local": 0, "served, top 64": 64 * 12 + 12}
        for name, values in seconds.items():
            print(
                json.dumps(
                    {
                        "teacher": name,
                        "seconds a step": round(statistics.median(values), 4),
                        "tokens a step": scored,
                        "bytes a token": sizes.get(name, 256 * 4),
                    }
                )
            )


if __name__ == "__main__":
    main(max(5, int(sys.argv[1])) if len(sys.argv) > 1 else 12)  # the first steps are not counted
