"""Fp16: an undivided sum skips no step that a plain mean does not skip, and rounds no worse."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_kd.divergences import available_divergences
from lightning_kd.fused import fused_linear_divergence, head_matmul
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import SFT, SupervisedKD
from lightning_kd.modules.half_precision import SumScale
from lightning_kd.normalization import make_normalization
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama

WINDOWS = {
    "one": [ragged_batch([(2, 40), (1, 61), (3, 25), (2, 50)])],
    "a short one first": [ragged_batch([(1, 2)]), ragged_batch([(2, 60)]), ragged_batch([(2, 58)])],
    "an empty one first": [ragged_batch([(5, 0)]), ragged_batch([(2, 60), (1, 60)])],
}


def fp16():
    """Lightning takes bfloat16 instead on a CPU, unless it is given this."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


class Scales(Callback):
    """The gradient scaler's scale behind each optimizer step, and the norms that were logged."""

    def on_fit_start(self, trainer, pl_module):
        self.scales, self.norms = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.scales.append(trainer.precision_plugin.scaler.get_scale())
            self.norms.append(trainer.callback_metrics["train/grad_norm"].item())


def of_a_plain_mean(window, steps):
    """Scales of a loop that divides each micro-batch by the tokens of the step, in the forward."""
    network, scaler = tiny_llama(0), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    tokens, scales = sum((b["labels"] != -100).sum().item() for b in window), []
    for _ in range(steps):
        for batch in window:
            with torch.autocast("cpu", torch.float16):
                logits = network(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            scaler.scale(loss / tokens).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def fit(window, steps, normalization="token", logits=None, **settings):
    seen = Scales()
    module = SFT(
        student=StudentSpec.of(tiny_llama(0)),
        normalization=normalization,
        logits_backend=logits,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
    )
    run = trainer(
        accumulate_grad_batches=len(window),
        max_steps=steps,
        plugins=[fp16()],
        callbacks=[seen],
        **settings,
    )
    run.fit(module, datamodule=BatchList(window * steps))
    return seen, module


@pytest.mark.slow
@pytest.mark.parametrize("logits", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_as_many_steps_are_skipped_as_of_a_plain_mean(window, logits):
    plain = of_a_plain_mean(window, 4)
    assert plain == [2.0**16] * 4
    seen, _ = fit(window, 4, logits=logits)
    assert seen.scales == plain  # a step that is skipped halves it


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_no_step_is_skipped_whatever_the_loss_is_divided_by(normalization):
    seen, _ = fit(WINDOWS["one"], 3, normalization)
    assert seen.scales == [2.0**16] * 3


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_the_gradient_is_that_of_float32(normalization, clip):
    window = WINDOWS["an empty one first"]
    found, exact = (
        fit_one_step(
            SupervisedKD(
                student=StudentSpec.of(tiny_llama(0)),
                teacher=LocalTeacher.of(tiny_llama(1)),
                normalization=normalization,
            ),
            window,
            plugins=plugins,
            gradient_clip_val=clip,
        )
        for plugins in ([fp16()], [])
    )
    assert found[0] == pytest.approx(exact[0], rel=1e-2)
    assert (found[1] - exact[1]).norm() < 2e-2 * exact[1].norm()


def test_the_norm_that_is_logged_is_that_of_the_mean():
    seen, _ = fit(WINDOWS["one"], 1)
    network = tiny_llama(0)
    (batch,) = WINDOWS["one"]
    logits = network(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
    assert seen.norms[0] == pytest.approx(norm.item(), rel=1e-2)


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_the_power_is_one_for_a_step_and_goes_into_checkpoints(normalization):
    """The largest total weight of a micro-batch: tokens, or rows where each row weighs 1."""
    window = [ScoredPositions.from_labels(b["labels"]) for b in WINDOWS["a short one first"]]
    module = SFT(student=StudentSpec.of(tiny_llama(0)), normalization=normalization)
    run = trainer(plugins=[fp16()], accumulate_grad_batches=len(window))
    rule = module.normalization
    weight = 3 if normalization == "sequence" else 2 + 60 + 58
    scale = SumScale()
    for _ in range(2):
        factors = [scale.sum_factor(run, scored, rule) for scored in window]
        assert len(set(factors)) == 1
        assert factors[0] <= 3 / weight
        assert scale.gradient_factor(run, len(window)) == 1 / factors[0]
    # The first step's guess is of that step alone.
    assert scale.largest == weight / 3
    assert factors[0] > 1.5 / weight
    module._sum_scale = scale
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    fresh = SFT(student=StudentSpec.of(tiny_llama(0)))
    fresh.on_load_checkpoint(checkpoint)
    assert fresh._sum_scale.sum_factor(run, window[1], rule) == factors[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_other_precisions_are_left_alone(precision):
    scale, run = SumScale(), trainer(precision=precision)
    scored = ScoredPositions.from_labels(WINDOWS["one"][0]["labels"])
    assert scale.sum_factor(run, scored, make_normalization("token")) == 1
    assert scale.gradient_factor(run, 1) == 1


def as_on_cuda(monkeypatch):
    """Products of fp16 that add up in float32, as the kernels of an accelerator make them."""

    def native(first, second, out):
        return second.dtype == out.dtype or first.dtype in (out.dtype, second.dtype)

    def product(first, second, out, add):
        made = first.float() @ second.float()
        out.copy_(out + made if add else made)

    monkeypatch.setattr(head_matmul, "_is_native", native)
    monkeypatch.setattr(head_matmul, "_product", product)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [n for n in available_divergences() if n != "alpha_beta"])
def test_rows_of_a_thousand_tokens_keep_their_gradient_in_fp16(divergence, monkeypatch):
    """``sequence`` weighs each of them 1/1000; a softmax over the vocabulary as little again."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(*s, generator=generator) for s in ((1000, 16), (4000, 16)) * 2]
    halves = [(tensor * size).half() for tensor, size in zip(draws, (1, 0.5) * 2, strict=True)]
    gradients = []
    for wide in (True, False):
        own, head, theirs, other = (t.double() if wide else t.clone() for t in halves)
        wanted = [own.requires_grad_(), head.requires_grad_()]
        if not wide:
            as_on_cuda(monkeypatch)
        result = fused_linear_divergence(
            own, head, theirs, other, divergence=divergence, weights=torch.full((1000,), 1e-3)
        )
        # What a gradient scaler does to a mean over rows, in the type of the states.
        made = torch.autograd.grad(result.total * 2.0**10, wanted)
        gradients.append([g.double() / 2.0**10 for g in made])
    for exact, found in zip(*gradients, strict=True):
        assert (found - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e3])
def test_fp16_products_of_gradients_add_up_over_chunks(size, monkeypatch):
    """Each chunk has a power of two of its own, which must not touch what is there already."""
    generator = torch.Generator().manual_seed(0)
    gradient, states = (
        torch.randn(8, 5, generator=generator),
        torch.randn(8, 3, generator=generator),
    )
    gradient, states = gradient * torch.tensor([[1.0]] * 4 + [[1e-3]] * 4) * size, states.half()
    as_on_cuda(monkeypatch)
    made = torch.full((5, 3), 7.0)
    head_matmul.to_weight(gradient[:4], states[:4], made, add=False)
    head_matmul.to_weight(gradient[4:], states[4:], made, add=True)
    torch.testing.assert_close(made, gradient.T @ states.float(), rtol=2e-3, atol=2e-3 * size)
