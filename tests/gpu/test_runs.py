"""Runs of every kind of method on a device, beside the same run on the CPU in float64."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, MiniLLM, OnPolicyDistillation, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

STEPS = 20
METHODS = {
    "supervised_kd": (SupervisedKD, None),
    "gkd": (GKD, {}),
    "minillm": (MiniLLM, {"mixture_alpha": 0.2}),
    "on_policy_distillation": (OnPolicyDistillation, {}),
}


class Losses(Callback):
    """The loss of each optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def losses(method, device, precision):
    """Those of a run, on the device in a precision."""
    kind, generation = METHODS[method]
    module = kind(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    seen = Losses()
    callbacks = [seen]
    if generation is not None:
        options = SamplingOptions(max_new_tokens=8)
        callbacks.insert(0, OnPolicyGeneration(generation=options, table_every=0, **generation))
    accelerator = "gpu" if device == "cuda" else "cpu"
    fit = trainer(
        accelerator=accelerator,
        precision=precision,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=callbacks,
    )
    fit.fit(module, datamodule=Letters(rows=4 * STEPS, batch_size=4))
    assert next(module.student.parameters()).is_cuda == (device == "cuda")
    return seen.values


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_in_float64(device, method):
    expected = losses(method, "cpu", "64-true")
    assert len(set(expected)) == STEPS
    assert losses(method, device, "32-true") == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_in_half_precision_the_losses_are_near_those_in_float64(device, precision):
    if device == "cpu" and precision == "16-mixed":
        pytest.skip("the scaler of 16-mixed needs a GPU")
    expected = losses("supervised_kd", "cpu", "64-true")
    came = losses("supervised_kd", device, precision)
    assert came == pytest.approx(expected, rel=0.05)
