"""Students of teachers that name k tokens: ``python -m tests.benchmarks.answers_figure OUT.png``.

A teacher that others have trained on short stories is written into a cache of each kind, and students
learn from it alone (forward KL, no cross-entropy), from the same start and in the same order; one has
the teacher beside it. Shows the loss per token on stories that none of them has seen, and how far each
is from the teacher there. With ``--write FILE`` a table goes between two marks of a document such as
``docs/teachers.md``.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_kd import CachedTeacher, DocumentData, LocalTeacher, StudentSpec, SupervisedKD
from lightning_kd.cache_writing import CacheOptions, write_cache
from lightning_kd.comparison.documents import replace_between_marks
from lightning_kd.teachers import Teacher
from tests.benchmarks.stories import DATA, STORIES, STUDENT, head

KS = (4, 16, 64, 256)
HELD_OUT, STEPS, EVERY, SEEDS = 200, 600, 100, 3
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
Points = dict[int, tuple[float, float]]
"""Steps -> loss per token, and forward KL from the teacher."""


class HeldOut(Callback):
    """Loss and forward KL on held-out text, over all of the vocabulary whatever the teacher answers."""

    def __init__(
        self, batches: Sequence[dict[str, torch.Tensor]], teacher: PreTrainedModel
    ) -> None:
        self.batches, self.points = batches, Points()
        with torch.no_grad():
            self.teacher = [
                teacher(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
                for batch in batches
            ]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Evaluate every so often."""
        if trainer.global_step % EVERY:
            return
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, theirs in zip(self.batches, self.teacher, strict=True):
            logits = pl_module.student(batch["input_ids"], batch["attention_mask"]).logits
            own, labels = logits.log_softmax(-1)[:, :-1], batch["labels"][:, 1:]
            scored, theirs = labels >= 0, theirs[:, :-1]
            picked = own.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            kl = (theirs.exp() * (theirs - own)).sum(-1)
            sums += torch.stack([-picked[scored].sum(), kl[scored].sum(), scored.sum()]).double()
        self.points[trainer.global_step] = (float(sums[0] / sums[2]), float(sums[1] / sums[2]))


def train(teacher: Teacher, data: DocumentData, watch: HeldOut, steps: int, seed: int) -> Points:
    """Train a student from a teacher alone."""
    L.seed_everything(seed, verbose=False)
    module = SupervisedKD(
        student=StudentSpec(config=STUDENT),
        teacher=teacher,
        alpha=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    )
    watch.points = {}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[watch], **QUIET
    )
    trainer.fit(module, datamodule=data)
    return watch.points


def draw(runs: dict[str, list[Points]], teacher: float, out: Path) -> None:
    """Loss over the steps, and at the end over k."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, curves) in enumerate(runs.items()):
        steps = sorted(curves[0])
        for axis, index in ((left, 0), (right, 1)):
            values = [mean(curve[step][index] for curve in curves) for step in steps]
            style = "k--" if name == "local" else f"C{number}-"
            axis.plot(steps, values, style, label=name, linewidth=1.3)
    left.axhline(teacher, color="gray", linestyle=":", label="the teacher")
    left.set_ylabel("nats per held-out token")
    right.set_ylabel("forward KL from the teacher")
    for axis in (left, right):
        axis.set_xlabel("steps")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    figure.savefig(out, dpi=90)


def table(runs: dict[str, list[Points]], sizes: dict[str, float], steps: int) -> str:
    """Mean and deviation over the seeds, at the last step."""
    lines = [
        "| teacher | bytes a token | nats per held-out token | forward KL from the teacher |",
        "| --- | --- | --- | --- |",
    ]
    for name, curves in runs.items():
        cells = [name, f"{sizes[name]:,.0f}"]
        for index in (0, 1):
            values = [curve[steps][index] for curve in curves]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the caches, train the students, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of models and tinystories")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps, in hundreds")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args(arguments)
    if given.steps < EVERY or given.steps % EVERY:
        parser.error(f"--steps is {given.steps}; give a multiple of {EVERY}")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    source = str(given.data / "models" / "stories260K")
    runs: dict[str, list[Points]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stories = given.data / "tinystories"
        data = DocumentData(
            tokenizer=source,
            train=head(stories / "train.jsonl", STORIES, folder / "train.jsonl"),
            validation=head(stories / "heldout.jsonl", HELD_OUT, folder / "heldout.jsonl"),
            max_length=128,
            truncation="right",
            batch_size=16,
        )
        caches = {str(k): CacheOptions(str(folder / f"top_{k}"), "top_k", k=k) for k in KS}
        caches["hidden"] = CacheOptions(str(folder / "hidden"))
        sizes, teachers = {"local": 0.0}, {}
        for name, options in caches.items():
            trainer = L.Trainer(accelerator="cpu", **QUIET)
            module = SupervisedKD(
                student=StudentSpec(config=STUDENT), teacher=LocalTeacher(source), alpha=0.0
            )
            manifest = write_cache(trainer, module, data, options)
            sizes[name] = sum(shard.size for shard in manifest.shards) / manifest.tokens
            teachers[name] = options.dirpath
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        data.setup("validate")
        watch = HeldOut(list(data.val_dataloader()), model)
        for name in [*teachers, "local"]:
            for seed in range(given.seeds):
                teacher = (
                    CachedTeacher(teachers[name]) if name in teachers else LocalTeacher(source)
                )
                points = train(teacher, data, watch, given.steps, seed)
                runs.setdefault(name, []).append(points)
        loss = of_teacher(watch)
    runs = {f"k = {name}" if name.isdigit() else name: curves for name, curves in runs.items()}
    sizes = {f"k = {name}" if name.isdigit() else name: size for name, size in sizes.items()}
    draw(runs, loss, given.out)
    made = table(runs, sizes, given.steps) + f"\nThe teacher itself: {loss:.3f} nats per token.\n"
    if given.write is None:
        print(made)
        return
    try:
        replace_between_marks(given.write, "students of k tokens", made)
    except ValueError as error:
        parser.error(str(error))


def of_teacher(watch: HeldOut) -> float:
    """Loss per token of the teacher."""
    total = count = 0.0
    for batch, theirs in zip(watch.batches, watch.teacher, strict=True):
        labels = batch["labels"][:, 1:]
        picked = theirs[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total -= float(picked[labels >= 0].sum())
        count += float((labels >= 0).sum())
    return total / count


if __name__ == "__main__":
    main()
