"""A server that fails in a run ends it: soon, with an error that helps, and a checkpoint."""

import time

import pytest
import torch

from lightning_kd.callbacks import OnPolicyGeneration, SaveOnTermination
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SupervisedKD
from lightning_kd.teachers import LocalTeacher, ServedTeacher, TeacherUnavailableError
from tests.serving.conftest import served
from tests.serving.faults import FAULTS, after
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

# In a test the logger is off, and the place of the checkpoint given.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
HANDSHAKE = 3
"""Questions that are asked before the first step."""


def module(url, method=SupervisedKD, **options):
    settings = {"timeout": 1.0, "retries": 0} | options
    teacher = LocalTeacher.of(tiny_llama(1)) if url is None else ServedTeacher([url], **settings)
    return method(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)


def fit(module, folder, *callbacks, steps=8, accumulate=1, checkpoint=None):
    run = trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[SaveOnTermination(str(folder)), *callbacks],
    )
    run.fit(module, datamodule=Letters(batch_size=2), ckpt_path=checkpoint, weights_only=True)
    return [p.detach().clone() for p in module.student.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_ends_with_an_error_and_a_checkpoint(name, tmp_path):
    fault, message = FAULTS[name]
    with served(drain_seconds=0.1) as server:
        after(server, HANDSHAKE + 4, fault)
        began = time.monotonic()
        with pytest.raises(TeacherUnavailableError, match=message) as error:
            fit(module(server.url), tmp_path)
        assert server.url in str(error.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert time.monotonic() - began < 25
    assert saved["global_step"] == 4
    assert str(tmp_path / "last.ckpt") in error.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.parametrize("answers", [5, 6, 11])
def test_the_run_that_goes_on_is_the_one_that_was_not_broken_off(answers, tmp_path):
    """Two micro-batches a step, so that one of the failures is in the middle of a step."""
    whole = fit(module(None), tmp_path / "other", accumulate=2)
    with served() as server:
        after(server, HANDSHAKE + answers, FAULTS["html"][0])
        with pytest.raises(TeacherUnavailableError):
            fit(module(server.url), tmp_path, accumulate=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == answers // 2
    with served() as server:  # another port: the URL may change
        rest = fit(module(server.url), tmp_path, accumulate=2, checkpoint=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


@pytest.mark.slow
def test_a_window_of_rollouts_that_was_broken_off_is_trained_on_as_it_was(tmp_path):
    def own_samples():
        generation = SamplingOptions(max_new_tokens=5)
        return OnPolicyGeneration(
            lmbda=1.0, generation=generation, steps_per_window=2, table_every=0
        )

    def local():
        return GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))

    whole = fit(local(), tmp_path / "other", own_samples())
    with served() as server:
        after(server, HANDSHAKE + 5, FAULTS["nothing"][0])
        with pytest.raises(TeacherUnavailableError):
            fit(module(server.url, GKD), tmp_path, own_samples())
    with served() as server:
        last = tmp_path / "last.ckpt"
        rest = fit(module(server.url, GKD), tmp_path, own_samples(), checkpoint=last)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


@pytest.mark.slow
def test_a_teacher_that_cannot_write_a_window_leaves_a_checkpoint_before_it(tmp_path):
    def of_teacher():
        generation = SamplingOptions(max_new_tokens=5)
        return OnPolicyGeneration(
            lmbda=0.0, off_policy="teacher", generation=generation, table_every=0
        )

    def local():
        return GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))

    whole = fit(local(), tmp_path / "other", of_teacher())
    with served() as server:
        honest, orders = server.endpoints.asks["/v1/generate"], []

        def three_times(body):
            orders.append(body)
            if len(orders) > 3:
                raise RuntimeError("out of memory")
            return honest(body)

        server.endpoints.asks = {**server.endpoints.asks, "/v1/generate": three_times}
        with pytest.raises(TeacherUnavailableError, match=r"status 500 .*out of memory"):
            fit(module(server.url, GKD), tmp_path, of_teacher())
    with served() as server:
        last = tmp_path / "last.ckpt"
        rest = fit(module(server.url, GKD), tmp_path, of_teacher(), checkpoint=last)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_another_teacher_is_no_way_to_go_on(tmp_path):
    with served() as server:
        after(server, HANDSHAKE + 2, FAULTS["nothing"][0])
        with pytest.raises(TeacherUnavailableError):
            fit(module(server.url), tmp_path)
    with (
        served(LocalTeacher.of(tiny_llama(2))) as server,
        pytest.raises(ValueError, match=r"teacher\.teacher: "),
    ):
        fit(module(server.url), tmp_path, checkpoint=tmp_path / "last.ckpt")


def test_a_failure_before_the_first_step_saves_nothing(tmp_path):
    with served() as server:
        after(server, HANDSHAKE, FAULTS["nothing"][0])
        with pytest.raises(TeacherUnavailableError):
            fit(module(server.url), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.slow
def test_a_failure_that_passes_is_no_failure(tmp_path):
    with served() as server:
        honest, asked = server.endpoints.asks["/v1/answers"], []

        def every_other(body):
            asked.append(body)
            if len(asked) % 2:
                raise RuntimeError("busy")
            return honest(body)

        server.endpoints.asks = {**server.endpoints.asks, "/v1/answers": every_other}
        rest = fit(module(server.url, retries=1, timeout=20.0), tmp_path, steps=2)
    whole = fit(module(None), tmp_path, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_another_server_takes_over(tmp_path):
    with served() as one, served(drain_seconds=0.1) as other:
        after(other, HANDSHAKE + 1, FAULTS["killed"][0])
        two = module(one.url, retries=2, timeout=20.0)
        two.teacher = ServedTeacher([one.url, other.url], retries=2, timeout=20.0)
        rest = fit(two, tmp_path, steps=4)
    whole = fit(module(None), tmp_path, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_a_failure_in_a_validation_leaves_the_step_before_it(tmp_path):
    with served() as server:
        after(server, HANDSHAKE + 4, FAULTS["nothing"][0])
        run = trainer(
            max_steps=8,
            max_epochs=-1,
            callbacks=[SaveOnTermination(str(tmp_path))],
            limit_val_batches=1,
            val_check_interval=3,
        )
        with pytest.raises(TeacherUnavailableError):
            run.fit(module(server.url), datamodule=Letters(batch_size=2, eval_batch_size=2))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
