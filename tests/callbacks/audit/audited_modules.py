"""Modules that normalize their loss wrongly on purpose, and correct modules."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.toys import ragged_batch, tiny_llama

THREE = [
    ragged_batch([(2, 5), (1, 3)], seed=1),
    ragged_batch([(6, 1), (1, 2)], seed=2),
    ragged_batch([(1, 9), (3, 4)], seed=3),
]
UNEQUAL_ROWS = [ragged_batch([(2, 5), (1, 3), (2, 2)], seed=1), ragged_batch([(1, 4)], seed=2)]
ALL_SCORED = [ragged_batch([(0, 5), (0, 3)], seed=1), ragged_batch([(0, 9), (0, 2)], seed=2)]


def scored(batch: Any) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum().float()


class Base(L.LightningModule):
    """Embedding and head, a token's loss at each label, and a way to reduce them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(18, 6)
        self.head = nn.Linear(6, 18)
        self.window_count = 0.0

    def hidden(self, batch: Any) -> Tensor:
        return self.embedding(batch["input_ids"])

    def token_losses(self, batch: Any) -> Tensor:
        logits = self.head(self.hidden(batch))[:, :-1]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        return losses.view(logits.shape[:2])

    def reduce(self, losses: Tensor, batch: Any) -> Tensor:
        return losses.sum() / scored(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.reduce(self.token_losses(batch), batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("nothing is validated here")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    # For correct modules: a sum, and one division per step.

    @property
    def micro_batches(self) -> int:
        return self.trainer.accumulate_grad_batches

    def multiply_gradients(self, factor: float) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def close(self, count: float) -> None:
        self.multiply_gradients(self.micro_batches * self.trainer.world_size / count)
        self.window_count = 0.0


# Modules with a fault.


class MeanOfMeans(Base):
    pass


class DividedTwice(Base):
    def reduce(self, losses, batch):
        return super().reduce(losses, batch) / self.micro_batches


class TimesMicroBatches(Base):
    def reduce(self, losses, batch):
        return super().reduce(losses, batch) * self.micro_batches


class UndividedSum(Base):
    def reduce(self, losses, batch):
        return losses.sum()


class PaddedLength(Base):
    def reduce(self, losses, batch):
        return losses.mean()


class AttendedTokens(Base):
    def reduce(self, losses, batch):
        return losses.sum() / batch["attention_mask"].sum()


class LongestRow(Base):
    def reduce(self, losses, batch):
        longest = (batch["labels"][:, 1:] != -100).sum(1).max()
        return losses.sum() / (len(losses) * longest)


class MeanOfRows(Base):
    """Correct if every micro-batch has the same number of rows."""

    def reduce(self, losses, batch):
        return (losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).mean()


class LastMicroBatchOnly(Base):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if (batch_idx + 1) % self.micro_batches == 0 else loss * 0


class DividedInTwoHooks(Base):
    def reduce(self, losses, batch):
        self.window_count += scored(batch).item()
        return losses.sum()

    def on_before_optimizer_step(self, optimizer):
        self.multiply_gradients(self.micro_batches / self.window_count)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.multiply_gradients(1 / self.window_count)
        self.window_count = 0.0


class StaleCount(Base):
    """Divides by the count of the previous step."""

    last_count = 1.0

    def reduce(self, losses, batch):
        self.window_count += scored(batch).item()
        return losses.sum()

    def on_before_optimizer_step(self, optimizer):
        self.multiply_gradients(self.micro_batches / self.last_count)
        self.last_count, self.window_count = self.window_count, 0.0


class SummedInOneProcess(Base):
    """Correct in one process: divides in on_before_optimizer_step."""

    def reduce(self, losses, batch):
        self.window_count += scored(batch).item()
        return losses.sum()

    def on_before_optimizer_step(self, optimizer):
        self.close(self.window_count)


class WithBatchNorm(SummedInOneProcess):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def hidden(self, batch):
        return self.norm(super().hidden(batch).transpose(1, 2)).transpose(1, 2)


class OwnBatchStatistics(SummedInOneProcess):
    def hidden(self, batch):
        hidden = super().hidden(batch)
        return hidden - hidden.mean(0, keepdim=True) if self.training else hidden


class AlwaysDropout(SummedInOneProcess):
    def hidden(self, batch):
        return F.dropout(super().hidden(batch), 0.3, training=True)


class LabelsOfTheNextRow(SummedInOneProcess):
    def token_losses(self, batch):
        return super().token_losses(batch | {"labels": batch["labels"].roll(1, 0)})


class MeanOverPadding(SummedInOneProcess):
    """Centers each row over its columns, padding included."""

    def hidden(self, batch):
        hidden = super().hidden(batch)
        return hidden - hidden.mean(1, keepdim=True)


class InBatchNegatives(Base):
    def training_step(self, batch, batch_idx):
        mask = batch["attention_mask"][..., None]
        vectors = (self.hidden(batch) * mask).sum(1) / mask.sum(1)
        targets = torch.arange(len(vectors), device=vectors.device)
        return F.cross_entropy(self.head(vectors) @ self.head(vectors).T, targets)


class MeanOfWeights(SummedInOneProcess):
    """Each token is weighted by the confidence there, over the mean confidence of the micro-batch."""

    def token_losses(self, batch):
        logits = self.head(self.hidden(batch))[:, :-1].float()
        confidence = logits.softmax(-1).amax(-1)
        mean = confidence[batch["labels"][:, 1:] != -100].mean()
        return super().token_losses(batch) * confidence / mean


OUTSIDE = {"calls": 0}


class StateOutside(SummedInOneProcess):
    def token_losses(self, batch):
        OUTSIDE["calls"] += 1
        return super().token_losses(batch) * (1 + OUTSIDE["calls"] % 7)


class ReadsAnIterator(SummedInOneProcess):
    def __init__(self):
        super().__init__()
        self.noise = iter(torch.rand(100).tolist())

    def reduce(self, losses, batch):
        return super().reduce(losses, batch) * next(self.noise)


class Manual(Base):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


# Modules with a fault over several processes.


class OneOverWorldSize(Base):
    def reduce(self, losses, batch):
        count = scored(batch)
        dist.all_reduce(count)
        return losses.sum() / count


class TimesWorldSize(Base):
    def reduce(self, losses, batch):
        return super().reduce(losses, batch) * self.trainer.world_size


class DividedByOwnCount(SummedInOneProcess):
    """Divides averaged gradients, so that the weights of the processes drift apart."""

    def close(self, count):
        self.multiply_gradients(self.micro_batches / count)
        self.window_count = 0.0


class HiddenGroup(SummedInOneProcess):
    """Holds its process group in a closure, where the audit does not find it."""

    def setup(self, stage):
        group = dist.new_group([0, 1])

        def add_up(count):
            dist.all_reduce(count, group=group)
            return count.item()

        self.add_up = add_up

    def on_before_optimizer_step(self, optimizer):
        self.close(self.add_up(torch.tensor(self.window_count)))


# Correct modules.


class DividedByItems(Base):
    """Divides as transformers does, by the token count of the step in the batch."""

    def reduce(self, losses, batch):
        return losses.sum() * self.micro_batches / batch["num_items_in_batch"]


class InClipping(SummedInOneProcess):
    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.close(self.window_count)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class AfterBackward(SummedInOneProcess):
    def on_before_optimizer_step(self, optimizer):
        pass

    def on_after_backward(self):
        if not self.trainer.fit_loop._should_accumulate():
            self.close(self.window_count)


class InOptimizerStep(SummedInOneProcess):
    def on_before_optimizer_step(self, optimizer):
        pass

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        self.close(self.window_count)
        optimizer.step()


class CountedAtBatchStart(SummedInOneProcess):
    def on_train_batch_start(self, batch, batch_idx):
        self.window_count += scored(batch).item()

    def reduce(self, losses, batch):
        return losses.sum()

    def on_before_optimizer_step(self, optimizer):
        self.multiply_gradients(self.micro_batches / self.window_count)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.fit_loop._should_accumulate():
            self.window_count = 0.0


class FrozenBatchNorm(WithBatchNorm):
    def on_train_batch_start(self, batch, batch_idx):
        self.norm.eval()


class Dropout(SummedInOneProcess):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def hidden(self, batch):
        return self.dropout(super().hidden(batch))


class Tied(SummedInOneProcess):
    def __init__(self):
        super().__init__()
        self.head.weight = self.embedding.weight


class FrozenWithAdapter(SummedInOneProcess):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))

    def hidden(self, batch):
        hidden = super().hidden(batch)
        return hidden + self.adapter(hidden)


class PopsLabels(SummedInOneProcess):
    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        loss = super().training_step(batch | {"labels": labels}, batch_idx)
        batch["attention_mask"].zero_()
        return {"loss": loss, "labels": labels}


class Counts(SummedInOneProcess):
    """Has counters, lists and a generator of its own, none of which enters the gradient."""

    def __init__(self):
        super().__init__()
        self.seen, self.history = 0, []
        self.generator = torch.Generator().manual_seed(1)

    def training_step(self, batch, batch_idx):
        self.seen += len(batch["labels"])
        self.history.append(torch.rand((), generator=self.generator).item())
        return super().training_step(batch, batch_idx)


class Everything(SummedInOneProcess):
    """Has all kinds of state that a training step may change, some of which enters the gradient."""

    calls = 0
    lengths: ClassVar[list[int]] = []

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("average", torch.zeros(()))
        self.held = [torch.zeros(3), nn.Linear(2, 2).weight.detach()]  # not registered
        self.seen, self.by_name, self.rows = [], {"tokens": 0}, set()
        self.metric = torchmetrics.MeanMetric()
        self.generators = [
            torch.Generator().manual_seed(1),
            random.Random(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
        ]
        self.array = np.zeros(2)
        self.frozen_copy = nn.Embedding(18, 6).requires_grad_(False)

    def hidden(self, batch):
        hidden = self.norm(super().hidden(batch).transpose(1, 2)).transpose(1, 2)
        return self.dropout(hidden) + self.frozen_copy(batch["input_ids"])

    def training_step(self, batch, batch_idx):
        type(self).calls += 1
        self.lengths.append(len(batch["labels"]))
        self.seen.append(batch_idx)
        self.by_name["tokens"] += int(scored(batch))
        self.rows.add(len(self.seen))
        self.array += np.random.rand(2)
        self.held[0] += random.random()
        numbers = [g.random() for g in self.generators[1:3]] + [self.generators[3].rand()]
        self.held[1].add_(torch.rand((), generator=self.generators[0]) + sum(numbers))
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss.detach())
        self.average.lerp_(loss.detach(), 0.5)
        with torch.no_grad():
            self.frozen_copy.weight.lerp_(self.embedding.weight, 0.1)
        self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.9
        return loss

    def state(self):
        own = [self.seen, self.by_name, self.rows, self.array.tolist(), self.window_count]
        drawn = [
            self.generators[0].get_state().tolist(),
            self.generators[1].getstate(),
            self.generators[2].bit_generator.state,
            self.generators[3].get_state()[1].tolist(),
        ]
        return [type(self).calls, self.lengths, own, drawn, self.metric.mean_value.item()]


class Positions(SummedInOneProcess):
    """Has as many learned positions as the longest row."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(10, 6)

    def hidden(self, batch):
        places = torch.arange(batch["input_ids"].shape[1])
        return super().hidden(batch) + self.positions(places)


class ListOfTensors(L.LightningModule):
    """Regression on the batches of a TensorDataset: lists of tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.layer(x)[:, 0], y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Nested(SummedInOneProcess):
    """Mappings in tuples, with text beside them."""

    def training_step(self, batch, batch_idx):
        inputs, (labels, names) = batch
        assert len(names) == len(labels)
        return super().training_step(inputs | {"labels": labels}, batch_idx)


class HalfPrecision(SummedInOneProcess):
    """Its features are float16, its products too."""

    def hidden(self, batch):
        return super().hidden(batch) * batch["scale"][:, None, None]

    def token_losses(self, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return super().token_losses(batch)


# Right over processes: the count added up in many ways.


class Reduced(SummedInOneProcess):
    def total(self, count: Tensor) -> float:
        dist.all_reduce(count)
        return count.item()

    def on_before_optimizer_step(self, optimizer):
        self.close(self.total(torch.tensor(self.window_count)))


class ImportedByName(Reduced):
    def total(self, count):
        all_reduce(count)
        return count.item()


class Gathered(Reduced):
    def total(self, count):
        counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        return sum(counts).item()


class GatheredObjects(Reduced):
    def total(self, count):
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, count.item())
        return sum(counts)


class Functional(Reduced):
    def total(self, count):
        return (functional_all_reduce(count, "sum", dist.group.WORLD) + 0).item()


class ByLightning(Reduced):
    def total(self, count):
        return self.all_gather(count).sum().item()


class ByStrategy(Reduced):
    def total(self, count):
        return self.trainer.strategy.reduce(count, reduce_op="sum").item()


class Remembers(Reduced):
    """Keeps the number of processes, and a group of its own, from the setup."""

    def setup(self, stage):
        self.world = dist.get_world_size()
        self.group = dist.new_group([0, 1])

    def close(self, count):
        self.multiply_gradients(self.micro_batches * self.world / count)
        self.window_count = 0.0

    def total(self, count):
        dist.all_reduce(count, group=self.group)
        return count.item()


class BeforeBackward(Base):
    """Has one micro-batch per step, so that the count is known before the backward pass."""

    def reduce(self, losses, batch):
        count = scored(batch)
        all_reduce(count)
        return losses.sum() * self.trainer.world_size / count


def ours(method, **options):
    def build():
        teacher = {} if method is SFT else {"teacher": LocalTeacher.of(tiny_llama(1))}
        return method(student=StudentSpec.of(tiny_llama(0)), **teacher, **options)

    return build


@dataclass(frozen=True)
class Case:
    """A module, its data, and the expected result of its audit."""

    name: str
    build: Callable[[], L.LightningModule]
    cause: str | None = None
    """Part of the expected cause; None for a correct module."""
    batches: Sequence[Any] = field(default_factory=lambda: THREE)
    processes: int = 1
    accumulate: int = 3
    note: bool = False
    """Whether a message says that other partitionings would differ."""
    causes: int = 1
    """Expected number of causes of a module with a fault."""


def batches_with(**fields):
    return [batch | {name: make(batch) for name, make in fields.items()} for batch in THREE]


ITEMS = batches_with(num_items_in_batch=lambda _: sum(scored(b) for b in THREE))
NESTED = [
    ({k: b[k] for k in ("input_ids", "attention_mask")}, (b["labels"], ["a", "b"])) for b in THREE
]
HALF = batches_with(scale=lambda _: torch.tensor([0.5, 1.5], dtype=torch.float16))
LISTED = [[torch.randn(4, 3), torch.randn(4)] for _ in range(3)]

PLANTED = [
    Case("mean of micro-batch means", MeanOfMeans, "mean of micro-batch means"),
    Case(
        "mean over rows, micro-batches of 3 and 1",
        MeanOfRows,
        "mean of micro-batch means",
        UNEQUAL_ROWS,
        accumulate=2,
    ),
    Case("divided by the number of micro-batches again", DividedTwice, "divided twice"),
    Case("multiplied by the number of micro-batches", TimesMicroBatches, "never divided"),
    Case("sum over tokens", UndividedSum, "undivided sum"),
    Case(
        "mean over the padded length", PaddedLength, "unscored tokens in the denominator", causes=2
    ),
    Case(
        "divided by attended tokens, prompts too",
        AttendedTokens,
        "unscored tokens in the denominator",
        causes=2,
    ),
    Case("divided by the longest row", LongestRow, "divided by the longest row"),
    Case("loss of the last micro-batch only", LastMicroBatchOnly, "only the last micro-batch"),
    Case("divided in two hooks", DividedInTwoHooks, "divided by the count twice"),
    Case("count of the step before", StaleCount, "stale count"),
    Case("BatchNorm in training mode", WithBatchNorm, "statistics of the micro-batch: norm"),
    Case(
        "its own batch statistics in training mode",
        OwnBatchStatistics,
        "statistics of the micro-batch: layers of the module",
    ),
    Case("dropout that is always on", AlwaysDropout, "random numbers are drawn"),
    Case(
        "labels rolled over the batch",
        LabelsOfTheNextRow,
        "the order of the rows matters",
        UNEQUAL_ROWS,
        accumulate=2,
    ),
    Case("centers a row over its padding", MeanOverPadding, "padding enters the loss"),
    Case("in-batch negatives", InBatchNegatives, "rows of a micro-batch depend on each other"),
    Case("weights over their mean", MeanOfWeights, "such as a mean of weights"),
    Case(
        "state outside of the module", StateOutside, "not repeatable with the same random numbers"
    ),
    Case("reads an iterator", ReadsAnIterator, "not audited: ReadsAnIterator.noise", causes=0),
    Case(
        "manual optimization",
        Manual,
        "refused: audit is 'first', but Manual steps the optimizer",
        accumulate=1,
        causes=0,
    ),
    Case(
        "count summed, gradients averaged",
        OneOverWorldSize,
        "1/world_size",
        processes=2,
        accumulate=1,
    ),
    Case(
        "multiplied by the number of processes",
        TimesWorldSize,
        "multiplied by world_size",
        processes=2,
        accumulate=1,
    ),
    Case(
        "averaged, then divided by the count of its own process",
        DividedByOwnCount,
        "weights drift apart",
        processes=2,
        accumulate=2,
    ),
    Case(
        "token mean of its own process",
        MeanOfMeans,
        "each process divides by its own count",
        processes=2,
        accumulate=1,
    ),
    Case(
        "mean of means over micro-batches and processes",
        MeanOfMeans,
        "mean of micro-batch means",
        processes=2,
        accumulate=2,
    ),
    Case(
        "a process group in a closure",
        HiddenGroup,
        "not audited: ValueError: the module communicates in a process group of its own",
        processes=2,
        accumulate=2,
        causes=0,
    ),
]
CORRECT = [
    Case("SFT", ours(SFT)),
    Case("SupervisedKD, per sequence", ours(SupervisedKD, normalization="sequence")),
    Case("sum over num_items_in_batch", DividedByItems, batches=ITEMS),
    Case("divided in on_before_optimizer_step", SummedInOneProcess),
    Case("divided in configure_gradient_clipping", InClipping),
    Case("divided in on_after_backward", AfterBackward),
    Case("divided in optimizer_step", InOptimizerStep),
    Case("counted in on_train_batch_start", CountedAtBatchStart),
    Case("BatchNorm in evaluation mode", FrozenBatchNorm),
    Case("dropout", Dropout),
    Case("tied weights", Tied),
    Case("frozen weights and an adapter", FrozenWithAdapter),
    Case("pops its labels, overwrites its mask", PopsLabels),
    Case("counters, lists, a generator of its own", Counts),
    Case("learned positions, rows of full length", Positions),
    Case("lists of tensors, equal micro-batches", ListOfTensors, batches=LISTED),
    Case("mappings in tuples, with text", Nested, batches=NESTED),
    Case("float16 features under autocast", HalfPrecision, batches=HALF),
    Case("every token scored", SummedInOneProcess, batches=ALL_SCORED, accumulate=2),
    Case(
        "token mean, one micro-batch, one process",
        MeanOfMeans,
        batches=THREE[:1],
        accumulate=1,
        note=True,
    ),
    Case("dist.all_reduce", Reduced, processes=2, accumulate=2),
    Case("from torch.distributed import all_reduce", ImportedByName, processes=2, accumulate=2),
    Case("dist.all_gather", Gathered, processes=2, accumulate=2),
    Case("dist.all_gather_object", GatheredObjects, processes=2, accumulate=2),
    Case("functional collectives", Functional, processes=2, accumulate=2),
    Case("self.all_gather", ByLightning, processes=2, accumulate=2),
    Case("trainer.strategy.reduce", ByStrategy, processes=2, accumulate=2),
    Case("number of processes and group kept", Remembers, processes=2, accumulate=2),
    Case(
        "count all-reduced before the backward pass",
        BeforeBackward,
        processes=2,
        accumulate=1,
        note=True,
    ),
    Case("SupervisedKD in two processes", ours(SupervisedKD), processes=2, accumulate=2),
]
