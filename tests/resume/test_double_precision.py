"""A run in float64 that goes on from a checkpoint, with weights that were made in float32."""

import torch

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama


def trained(steps, *, checkpoint=None):
    module = SFT(
        student=StudentSpec.of(tiny_llama(0)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    run = trainer(max_steps=steps, max_epochs=-1, precision="64-true")
    run.fit(module, datamodule=Letters(16, batch_size=2), ckpt_path=checkpoint)
    return module.student.state_dict(), run


def test_no_weight_is_rounded(tmp_path):
    whole, _ = trained(4)
    _, run = trained(2)
    run.save_checkpoint(tmp_path / "2.ckpt")
    resumed, _ = trained(4, checkpoint=tmp_path / "2.ckpt")
    assert all(weight.dtype == torch.float64 for weight in resumed.values())
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
