"""A served teacher trains as the same teacher in the process does: bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, BabyLlama, OnPolicyDistillation, SupervisedKD
from lightning_kd.teachers import LocalTeacher, ServedTeacher, TeacherEnsemble
from tests.serving.conftest import served
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

STEPS = 50


class Losses(Callback):
    """The loss of every step, as it is logged."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def run(method, teacher, *callbacks, steps=STEPS, **options):
    """Losses and weights of a run."""
    losses = Losses()
    student = StudentSpec.of(tiny_llama(0))
    module = method(student=student, teacher=teacher, **options)
    fit = trainer(max_steps=steps, max_epochs=-1, callbacks=[losses, *callbacks])
    fit.fit(module, datamodule=Letters(batch_size=4))
    return losses.values, [p.detach().clone() for p in module.student.parameters()]


def same(first, second):
    assert first[0] == second[0]
    assert len(first[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def own_samples():
    return OnPolicyGeneration(
        lmbda=0.5, generation=SamplingOptions(max_new_tokens=6), steps_per_window=2, table_every=0
    )


def two_teachers(combine):
    return TeacherEnsemble(
        [LocalTeacher.of(tiny_llama(seed)) for seed in (1, 2)], combine=combine, weights=[2.0, 1.0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "divergence": "reverse_kl"}])
def test_supervised_kd(server, options):
    local = run(SupervisedKD, LocalTeacher.of(tiny_llama(1)), **options)
    same(local, run(SupervisedKD, ServedTeacher([server.url]), **options))


@pytest.mark.slow
def test_gkd_on_samples_of_the_student(server):
    local = run(GKD, LocalTeacher.of(tiny_llama(1)), own_samples())
    same(local, run(GKD, ServedTeacher([server.url]), own_samples()))


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_the_ensemble_of_baby_llama(combine):
    with served(two_teachers(combine)) as server:
        options = {"kl_scale": "batchmean"}
        local = run(BabyLlama, two_teachers(combine), **options)
        same(local, run(BabyLlama, ServedTeacher([server.url]), **options))


@pytest.mark.slow
def test_two_servers_make_an_ensemble():
    with served() as one, served(LocalTeacher.of(tiny_llama(2))) as other:
        remote = TeacherEnsemble([ServedTeacher([s.url]) for s in (one, other)], weights=[2.0, 1.0])
        same(run(BabyLlama, two_teachers("logits"), steps=4), run(BabyLlama, remote, steps=4))


@pytest.mark.slow
def test_on_policy_distillation_from_token_log_probs(server):
    def always():
        generation = SamplingOptions(max_new_tokens=6)
        return OnPolicyGeneration(lmbda=1.0, generation=generation, table_every=0)

    remote = ServedTeacher([server.url], payload="token_log_probs")
    local = run(OnPolicyDistillation, LocalTeacher.of(tiny_llama(1)), always(), steps=4)
    served_run = run(OnPolicyDistillation, remote, always(), steps=4)
    assert served_run[0] == pytest.approx(local[0], abs=1e-5)


@pytest.mark.slow
def test_completions_of_the_teacher_are_those_of_the_local_one(server):
    def teachers_windows():
        generation = SamplingOptions(max_new_tokens=6)
        return OnPolicyGeneration(
            lmbda=0.0, off_policy="teacher", generation=generation, table_every=0
        )

    local = run(GKD, LocalTeacher.of(tiny_llama(1)), teachers_windows(), steps=6)
    same(local, run(GKD, ServedTeacher([server.url]), teachers_windows(), steps=6))
