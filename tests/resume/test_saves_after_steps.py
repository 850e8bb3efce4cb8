"""A signal comes at any time; the checkpoint is saved after the step, with all that belongs to it."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.trainer.connectors import signal_connector

from lightning_kd.callbacks import SaveOnTermination
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.harness import Letters
from tests.support.toys import tiny_llama


class Signal(Callback):
    """Sends a signal to this process before a micro-batch, counted from 0."""

    def __init__(self, number, before):
        self.number, self.before = number, before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.before:
            os.kill(os.getpid(), self.number)


def weights_after(callbacks=(), resume=None, accumulate=2, **options):
    """The last weights of a run of 6 optimizer steps."""
    torch.manual_seed(0)
    module = SFT(
        student=StudentSpec.of(tiny_llama(0, attention_dropout=0.1)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        callbacks=[*callbacks],
        **quiet,
        **options,
    )
    trainer.fit(module, datamodule=Letters(batch_size=2), ckpt_path=resume)
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_saved_although_their_callback_is_behind_that_which_saves(tmp_path):
    """One micro-batch a step: in the next of a step the average would be made up for."""

    def weights(*more, resume=None):
        callbacks = [SaveOnTermination(str(tmp_path)), EMAWeightAveraging(decay=0.5), *more]
        return weights_after(callbacks, resume, accumulate=1)

    expected = weights()
    with pytest.raises(SystemExit) as ended:
        weights(Signal(signal.SIGTERM, before=3))
    assert ended.value.code == 128 + signal.SIGTERM
    assert_same(weights(resume=tmp_path / "last.ckpt"), expected)
    plain = weights_after(accumulate=1)
    assert not all(torch.equal(plain[name], expected[name]) for name in expected)


def test_signals_do_after_a_run_what_they_did_before(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    weights_after([SaveOnTermination(str(tmp_path))])
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def slurm(monkeypatch):
    """The environment of a job of one process; what it asks of the cluster."""
    for name, value in {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    commands = []
    monkeypatch.setattr(signal_connector, "call", lambda command: commands.append(command) or 0)
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("before", [4, 5])
def test_a_slurm_job_is_saved_after_the_step_and_requeued(tmp_path, slurm, before):
    """The signal comes before the first or the second micro-batch of the third step."""
    handler = signal.getsignal(signal.SIGUSR1)
    expected = weights_after(default_root_dir=tmp_path / "uninterrupted")
    ended = weights_after([Signal(signal.SIGUSR1, before)], default_root_dir=tmp_path)
    assert slurm == [["scontrol", "requeue", "1234"]]
    assert_same(ended, expected)  # it goes on until SLURM ends it
    assert signal.getsignal(signal.SIGUSR1) == handler
    (saved,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 3
    # Lightning looks for it when the job begins anew.
    assert_same(weights_after(default_root_dir=tmp_path), expected)
    assert len(slurm) == 1
