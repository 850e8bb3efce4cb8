"""The same samples, cut differently: does the gradient stay the same?"""

import copy
import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_kd.callbacks.batch_cuts import (
    from_all_ranks,
    join_rows,
    pad_rows,
    regroup,
    split_rows,
)
from lightning_kd.types import IGNORE_INDEX

Gradient = list[Tensor]
"""One tensor for each parameter that has a gradient."""


@dataclass(frozen=True)
class AuditReport:
    """How far the gradients of other cuts are from that of all samples in one micro-batch."""

    differences: dict[str, float]
    """Relative difference of each cut: norm of the difference over norm of the gradient."""
    causes: list[str]
    """What is recognized as the reason; empty where nothing is wrong or nothing is recognized."""

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(self.differences.values())


def audit_window(
    trainer: L.Trainer, module: L.LightningModule, window: Sequence[Any], tolerance: float
) -> AuditReport:
    """Take the gradient of a window's samples in several cuts, and compare.

    Each gradient goes the way of Lightning's automatic optimization: ``training_step`` on each
    micro-batch, its loss divided by their number, the backward pass, the mean over ranks, the
    module's ``on_before_optimizer_step``. Dropout is off, so that only the cut differs. All ranks
    call it together. Weights, gradients, random states, buffers and the module's own attributes are
    as before when it returns.

    Args:
        trainer: The trainer of the module.
        module: Any module with automatic optimization.
        window: The micro-batches of an optimizer step on this rank.
        tolerance: Relative difference above which a cause is looked for.
    """
    world_size = trainer.world_size
    with _undisturbed(trainer, module):
        run = _Runner(trainer, module)
        as_trained = run.gradient(window, over_ranks=world_size > 1)
        parts = from_all_ranks(window) if world_size > 1 else list(window)
        with _as_one_process(trainer) if world_size > 1 else ExitStack():
            samples = [sample for part in parts for sample in split_rows(part)]
            whole = join_rows(samples)
            reference = run.gradient([whole])
            cuts = {
                "as_trained": as_trained,
                "per_sample": run.gradient(samples),
                "reversed": run.gradient(regroup(samples[::-1], parts)),
                "padded": run.gradient([pad_rows(whole, 8)]),
            }
            differences = {name: _relative(g, reference) for name, g in cuts.items()}
            causes = []
            if max(differences.values()) > tolerance:
                causes = _causes(run, samples, reference, cuts, tolerance, world_size)
    return AuditReport(differences, causes)


def _causes(
    run: "_Runner",
    samples: Sequence[Any],
    reference: Gradient,
    cuts: Mapping[str, Gradient],
    tolerance: float,
    world_size: int,
) -> list[str]:
    """The faults that explain the differences."""
    single = _scored_tokens(samples)
    attended = _attended_tokens(samples)
    mean, by_scored, by_attended = _weighted_sums(
        run,
        samples,
        [[1.0] * len(samples), single or [1.0] * len(samples), attended or [1.0] * len(samples)],
    )
    causes = []
    unscored = attended and single and _relative(by_attended, by_scored) > tolerance
    if _relative(cuts["padded"], reference) > tolerance or (
        unscored and _relative(by_attended, reference) < tolerance < _relative(by_scored, reference)
    ):
        causes.append(
            "denominator of unscored text: the divisor counts prompt or padding tokens; count "
            "what is scored"
        )
    ratio = _projection(cuts["per_sample"], mean)
    count = len(samples)
    if _close(ratio, 1 / count) and count > 1:
        causes.append(
            "divided twice: training_step divides by the number of micro-batches, and Lightning "
            "does so again; leave it to Lightning"
        )
    elif _close(ratio, count) and count > 1:
        causes.append(
            "never divided: the loss grows with the number of micro-batches; divide by a count "
            "of the whole optimizer step"
        )
    elif _relative(cuts["per_sample"], mean) < tolerance < _relative(mean, reference):
        causes.append(
            "mean of micro-batch means: each micro-batch is divided by its own count, so tokens "
            "in short ones weigh more; divide the sum of the whole optimizer step by its count"
        )
    if world_size > 1:
        ratio = _projection(cuts["as_trained"], reference)
        if _close(ratio, 1 / world_size):
            causes.append(
                "1/world_size: the count is added up over ranks, but the strategy takes the mean "
                "of the gradients; multiply by the number of ranks"
            )
    return causes


class _Runner:
    """Gradients of a module, the way automatic optimization computes them."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer: Any = trainer
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def gradient(self, micro_batches: Sequence[Any], *, over_ranks: bool = False) -> Gradient:
        for parameter in self.parameters:
            parameter.grad = None
        self.trainer.accumulate_grad_batches = len(micro_batches)
        with_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        for index, batch in enumerate(micro_batches):
            with self.trainer.precision_plugin.train_step_context():
                output = self.module.training_step(batch, *([index] if with_index else []))
            loss = output["loss"] if isinstance(output, Mapping) else output
            assert isinstance(loss, Tensor)  # automatic optimization asks for a loss
            torch.autograd.backward(loss / len(micro_batches))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if over_ranks:
                torch.distributed.all_reduce(gradient)
                gradient /= self.trainer.world_size
            parameter.grad = gradient
        for optimizer in self.trainer.optimizers:
            self.module.on_before_optimizer_step(optimizer)
        return [p.grad.clone() for p in self.parameters if p.grad is not None]


def _weighted_sums(
    run: _Runner, samples: Sequence[Any], weightings: Sequence[Sequence[float]]
) -> list[Gradient]:
    """Weighted means of the gradients of single samples; one sample's gradient at a time."""
    sums: list[Gradient] = [[] for _ in weightings]
    for index, sample in enumerate(samples):
        gradient = run.gradient([sample])
        for k, weights in enumerate(weightings):
            scaled = [g * (weights[index] / sum(weights)) for g in gradient]
            sums[k] = [a + b for a, b in zip(sums[k], scaled, strict=True)] if index else scaled
    return sums


def _dot(a: Gradient, b: Gradient) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _relative(gradient: Gradient, reference: Gradient) -> float:
    difference = [a - b for a, b in zip(gradient, reference, strict=True)]
    norm = _dot(reference, reference) ** 0.5
    distance: float = _dot(difference, difference) ** 0.5
    return distance if norm == 0 else distance / norm


def _projection(gradient: Gradient, onto: Gradient) -> float:
    return _dot(gradient, onto) / max(_dot(onto, onto), 1e-300)


def _close(a: float, b: float) -> bool:
    return abs(a - b) < 0.02 * b


def _scored_tokens(samples: Sequence[Any]) -> list[float] | None:
    if not all(isinstance(s, Mapping) and isinstance(s.get("labels"), Tensor) for s in samples):
        return None
    return [float((s["labels"][:, 1:] != IGNORE_INDEX).sum()) for s in samples]


def _attended_tokens(samples: Sequence[Any]) -> list[float] | None:
    if not all(isinstance(s, Mapping) and "attention_mask" in s for s in samples):
        return None
    return [float(s["attention_mask"].sum()) for s in samples]


# Leaving no trace.


@contextmanager
def _as_one_process(trainer: L.Trainer) -> Iterator[None]:
    """What asks for other ranks finds none: every rank computes the whole by itself."""
    dist = torch.distributed
    with ExitStack() as patches:
        for name, answer in (
            ("is_initialized", lambda: False),
            ("get_world_size", lambda *_, **__: 1),
            ("all_reduce", lambda *_, **__: None),
        ):
            patches.enter_context(patch.object(dist, name, answer))
        patches.enter_context(patch.object(type(trainer.strategy), "world_size", 1))
        yield


@contextmanager
def _undisturbed(trainer: Any, module: L.LightningModule) -> Iterator[None]:
    """Put everything back that a training step may change, and log nothing meanwhile."""
    gradients = [(p, p.grad) for p in module.parameters()]
    buffers = [(b, b.clone()) for b in module.buffers()]
    training = [(m, m.training) for m in module.modules()]
    attributes = _attributes(trainer, module)
    window = trainer.accumulate_grad_batches
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with ExitStack() as patches:
        for name in ("log", "log_dict"):
            patches.enter_context(patch.object(type(module), name, lambda *_, **__: None))
        try:
            for part, _ in training:
                part.training = False
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, value in buffers:
                buffer.data.copy_(value)
            for part, values in attributes:
                part.__dict__.update(values)
            for part, mode in training:
                part.training = mode
            trainer.accumulate_grad_batches = window
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def _attributes(trainer: Any, module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Copies of what modules remember beside weights: counters, sums, metric states."""
    kept = (nn.Module, nn.Parameter, L.Trainer)
    # What a copy must share with the original: models that are held but not registered, above all.
    # issubclass, not isinstance: that would ask objects for their class, and some warn then.
    memo = {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), kept)}
    registered = {"_modules", "_parameters", "_buffers", "_trainer", "_fabric"}
    copies = []
    for part in module.modules():
        values = {}
        for name, value in part.__dict__.items():
            if name not in registered:
                try:
                    values[name] = copy.deepcopy(value, memo)
                except Exception:  # noqa: S112  what cannot be copied is left as it is
                    continue
        copies.append((part, values))
    return copies
