"""Caches of toy teachers, and runs that read them."""

import shutil
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.cache_writing import CacheOptions, write_cache
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama


def ensemble():
    """Two models of different widths."""
    members = [LocalTeacher.of(tiny_llama(seed, hidden_size=8 * seed)) for seed in (2, 3)]
    return TeacherEnsemble(members, weights=[1.0, 2.0])


def method(teacher, kind=SupervisedKD, **options):
    """A method with a student that starts equal in every call."""
    student = StudentSpec.of(tiny_llama(1))
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.05)  # noqa: E731
    return kind(student=student, teacher=teacher, optimizer=optimizer, **options)


def written(place: Path, module=None, data=None, **options):
    """A cache of what a method's teacher says."""
    module = module or method(LocalTeacher.of(tiny_llama(2)))
    data = data or Letters(40, batch_size=2)
    given = CacheOptions(str(place), **{"shard_megabytes": 1e-3} | options)
    write_cache(trainer(), module, data, given)
    return place


def copied(cache: Path, place: Path) -> Path:
    """A cache that a test may damage."""
    return shutil.copytree(cache, place)


class Losses(Callback):
    """The loss of each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def fitted(module, data, **settings):
    """Losses of all steps, and the weights after the last."""
    losses = Losses()
    trainer(callbacks=[losses], **settings).fit(module, datamodule=data)
    return losses.values, [p.detach().clone() for p in module.student.parameters()]
