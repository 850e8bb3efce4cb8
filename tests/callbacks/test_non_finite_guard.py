import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_kd.callbacks import NonFiniteGuard
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCHES = [ragged_batch([(2, 5), (1, 3)], seed) for seed in range(8)]


class Poison(Callback):
    """Non-finite gradient in one micro-batch, or in all from one on."""

    def __init__(self, *poisoned, value=float("nan")):
        self.poisoned, self.value = poisoned, value
        self.weights = []

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.batch_idx in self.poisoned:
            next(pl_module.parameters()).grad[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        state = trainer.optimizers[0].state
        moments = [v["exp_avg"].flatten() for v in state.values()]
        self.weights.append(torch.cat([weights, *moments]).clone())


def fit(guard, poison, **settings):
    module = SFT(
        student=StudentSpec.of(tiny_llama(0)),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    )
    run = trainer(callbacks=[guard, poison], **settings)
    run.fit(module, datamodule=BatchList(BATCHES))
    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:optimizer step 2 was skipped")
def test_a_step_with_a_non_finite_gradient_changes_nothing(tmp_path, value):
    poison = Poison(2, value=value)
    guard = NonFiniteGuard("skip", dirpath=str(tmp_path / "bad"))
    run = fit(guard, poison, accumulate_grad_batches=2)
    assert run.global_step == 4
    before, after = poison.weights[2], poison.weights[3]
    assert torch.equal(before, after)
    assert not torch.equal(poison.weights[1], poison.weights[0])
    assert not torch.equal(poison.weights[5], after)
    assert poison.weights[-1].isfinite().all()
    assert run.callback_metrics["train/skipped_steps"] == guard.state_dict()["skipped"] == 1
    # Both micro-batches of the step are there to be looked at.
    for number in (0, 1):
        saved = load_file(tmp_path / "bad" / f"step2_rank0_batch{number}.safetensors")
        assert torch.equal(saved["input_ids"], BATCHES[2 + number]["input_ids"])


def test_a_run_is_stopped_with_the_weights_of_the_previous_step(tmp_path):
    poison = Poison(3)
    with pytest.raises(ValueError, match="gradient of optimizer step 4 is not finite; its batches"):
        fit(NonFiniteGuard(dirpath=str(tmp_path)), poison)
    assert len(poison.weights) == 3
    assert (tmp_path / "step4_rank0_batch0.safetensors").exists()


@pytest.mark.filterwarnings("ignore:optimizer step . was skipped")
def test_a_run_that_does_not_recover_is_stopped(tmp_path):
    with pytest.raises(ValueError, match="optimizer step 6 is not finite"):
        fit(NonFiniteGuard("skip", max_skips=2, dirpath=str(tmp_path)), Poison(1, 3, 4, 5, 6))


def test_the_count_of_skipped_steps_continues_after_a_resume():
    guard = NonFiniteGuard("skip")
    guard.load_state_dict({"skipped": 3})
    assert guard.state_dict() == {"skipped": 3}


@pytest.mark.parametrize(
    ("values", "said"), [(("leave",), "stop"), (("skip", 0), "max_skips is 0")]
)
def test_values_out_of_range_are_rejected(values, said):
    with pytest.raises(ValueError, match=said):
        NonFiniteGuard(values[0], **({"max_skips": values[1]} if len(values) > 1 else {}))
