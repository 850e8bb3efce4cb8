"""What the base module promises to every method."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT, BabyLlama, SupervisedKD, WarmupCosine
from lightning_kd.normalization import ConstantLength
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama

LENGTHS = [(2, 5), (1, 3), (3, 7), (2, 1), (1, 9), (2, 2), (3, 0), (1, 4)]
ROWS = ragged_batch(LENGTHS)


def cut(rows_per_micro_batch):
    """The same rows as micro-batches, each padded to its own longest row."""
    pieces = []
    for start in range(0, len(LENGTHS), rows_per_micro_batch):
        rows = slice(start, start + rows_per_micro_batch)
        longest = int(ROWS["attention_mask"][rows].sum(-1).max())
        pieces.append(
            {k: v[rows] if k == "row" else v[rows, :longest].clone() for k, v in ROWS.items()}
        )
    return pieces


def kd(normalization="token", **settings):
    return SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        normalization=normalization,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("normalization", ["token", "sequence", "batch", ConstantLength(10)])
def test_the_gradient_does_not_depend_on_the_cut(normalization, clip):
    whole, whole_gradient = fit_one_step(kd(normalization), cut(8), gradient_clip_val=clip)
    if clip:
        assert whole_gradient.norm().item() == pytest.approx(clip, rel=1e-4)
    for rows in (4, 2, 1):
        loss, gradient = fit_one_step(kd(normalization), cut(rows), gradient_clip_val=clip)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert (gradient - whole_gradient).norm() / whole_gradient.norm() < 1e-5


class Announced(BatchList):
    """Says how long the rows of its splits are."""

    def __init__(self, split, tokens):
        super().__init__([ROWS])
        self.rows = {split: (tokens, 1)}

    def longest(self):
        return self.rows


@pytest.mark.parametrize("split", ["train", "validate"])
def test_rows_beyond_a_models_positions_are_refused_before_the_first_step(split):
    for tokens, steps in ((24, 1), (25, 0)):
        module = SFT(student=StudentSpec.of(tiny_llama(0, max_position_embeddings=24)))
        fit = trainer(max_steps=1)
        if steps:
            fit.fit(module, datamodule=Announced(split, tokens))
        else:
            with pytest.raises(ValueError, match=f"{split} rows take up to 25 .* has 24 positions"):
                fit.fit(module, datamodule=Announced(split, tokens))
        assert fit.global_step == steps


def test_every_third_step_is_logged_before_and_after_it_is_taken():
    module = kd()
    steps = SimpleNamespace(log_every_n_steps=3, global_step=0)
    module._trainer = steps
    seen = {0: [], 1: []}
    for steps.global_step in range(1, 10):
        for taken, logged in seen.items():
            if module._logs_this_step(taken=taken):
                logged.append(steps.global_step - taken)  # the number of the step, from 0
    assert seen == {0: [2, 5, 8], 1: [2, 5, 8]}


def test_a_short_last_window_is_divided_by_what_it_holds():
    fit = trainer(accumulate_grad_batches=3, max_steps=2)
    module = kd(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    fit.fit(module, datamodule=BatchList(cut(2)))
    last, _ = fit_one_step(kd(), cut(2)[3:])
    assert fit.global_step == 2
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(last, rel=1e-6)


def test_loggers_see_the_same_names():
    fit = trainer(max_steps=1, limit_val_batches=1.0)
    fit.fit(kd(), datamodule=BatchList(cut(8), evaluate=cut(4)))
    both = {
        *("loss", "tokens", "cross_entropy", "divergence", "perplexity", "forward_kl"),
        *("reverse_kl", "top1_agreement", "student_entropy", "teacher_entropy"),
        "entropy_gap",
    }
    assert set(fit.callback_metrics) == (
        {f"{stage}/{name}" for stage in ("train", "val") for name in both}
        | {"train/lr", "train/grad_norm"}
    )
    assert fit.callback_metrics["val/tokens"].item() == sum(c for _, c in LENGTHS)
    assert fit.callback_metrics["train/tokens"].item() == sum(c for _, c in LENGTHS)


def test_validation_is_the_mean_over_the_whole_set_and_metrics_are_at_temperature_1():
    student, teacher = tiny_llama(0), tiny_llama(1)
    results = []
    for rows in (8, 3):
        module = SupervisedKD(
            student=StudentSpec.of(student), teacher=LocalTeacher.of(teacher), temperature=4.0
        )
        (result,) = trainer(limit_test_batches=1.0).test(
            module, datamodule=BatchList([], evaluate=cut(rows)), verbose=False
        )
        results.append(result)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    z = student(ROWS["input_ids"], attention_mask=ROWS["attention_mask"]).logits[:, :-1]
    u = teacher(ROWS["input_ids"], attention_mask=ROWS["attention_mask"]).logits[:, :-1]
    labels = ROWS["labels"][:, 1:]
    scored = labels != -100
    q = torch.distributions.Categorical(logits=z[scored].double())
    p = torch.distributions.Categorical(logits=u[scored].double())
    nll = -q.log_prob(labels[scored]).mean()
    expected = {
        "test/forward_kl": torch.distributions.kl_divergence(p, q).mean().item(),
        "test/reverse_kl": torch.distributions.kl_divergence(q, p).mean().item(),
        "test/student_entropy": q.entropy().mean().item(),
        "test/teacher_entropy": p.entropy().mean().item(),
        "test/top1_agreement": (q.mode == p.mode).double().mean().item(),
        "test/perplexity": nll.exp().item(),
        "test/cross_entropy": nll.item(),
    }
    assert {k: results[0][k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_the_teacher_is_in_no_checkpoint_and_does_not_train(tmp_path):
    big = tiny_llama(1, hidden_size=64, intermediate_size=256)
    before = {k: v.clone() for k, v in big.state_dict().items()}
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(big))
    fit = trainer(
        max_steps=2,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="step")],
    )
    fit.fit(module, datamodule=BatchList(cut(2)))
    path = tmp_path / "step.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    student_bytes = sum(p.numel() * 4 for p in module.student.parameters())
    teacher_bytes = sum(p.numel() * 4 for p in big.parameters())
    assert all(key.startswith("student.") for key in checkpoint["state_dict"])
    assert not any(key.startswith("teacher") for key, _ in module.named_parameters())
    # Weights and Adam's two moments, and room for the archive; a teacher would not fit.
    assert 3 * student_bytes < path.stat().st_size < 3 * student_bytes + 100_000 < teacher_bytes
    assert all(torch.equal(before[k], v) for k, v in big.state_dict().items())
    assert not big.training


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(resume=None, dropout=0.3):
        module = SFT(
            student=StudentSpec.of(tiny_llama(0, attention_dropout=dropout)),
            lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 1),
        )
        trainer(max_steps=4, callbacks=[] if resume else [SaveInTheMiddle()]).fit(
            module, datamodule=BatchList(cut(2)), ckpt_path=resume, weights_only=True
        )
        return torch.cat([p.flatten() for p in module.student.parameters()])

    without_dropout = run(dropout=0.0)
    whole = run()
    torch.manual_seed(12345)
    assert torch.equal(run(resume=tmp_path / "middle.ckpt"), whole)
    assert not torch.equal(without_dropout, whole)


def test_the_checkpoint_of_another_method_is_refused(tmp_path):
    fit = trainer(max_steps=1)
    fit.fit(kd(), datamodule=BatchList(cut(8)))
    fit.save_checkpoint(tmp_path / "kd.ckpt")
    with pytest.raises(ValueError, match="written by SupervisedKD, this is SFT"):
        trainer(max_steps=2).fit(
            SFT(student=StudentSpec.of(tiny_llama(0))),
            datamodule=BatchList(cut(8)),
            ckpt_path=tmp_path / "kd.ckpt",
        )


@pytest.mark.parametrize("policy", ["equal", "shared"])
def test_unequal_vocabularies_follow_the_policy(policy):
    """The surplus logits of the teacher are cut off before the softmax, and what they held logged."""
    student, teacher = tiny_llama(0), tiny_llama(1, vocab_size=21)
    module = SupervisedKD(
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        vocabulary=policy,
        alpha=0.0,
    )
    fit = trainer(max_steps=1)
    if policy == "equal":
        with pytest.raises(ValueError, match="student has 18 logits, the teacher 21"):
            fit.fit(module, datamodule=BatchList([ROWS]))
        return
    z = student(ROWS["input_ids"], attention_mask=ROWS["attention_mask"]).logits[:, :-1]
    u = teacher(ROWS["input_ids"], attention_mask=ROWS["attention_mask"]).logits[:, :-1]
    scored = ROWS["labels"][:, 1:] != -100
    p, q = u[scored][:, :18].softmax(-1), z[scored].softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean().item()
    dropped = u[scored].softmax(-1)[:, 18:].sum(-1).mean().item()
    with pytest.warns(UserWarning, match="teacher gives .* beyond the 18 that are compared"):
        fit.fit(module, datamodule=BatchList([ROWS]))
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert fit.callback_metrics["train/teacher_dropped_mass"].item() == pytest.approx(
        dropped, rel=1e-5
    )


def test_a_window_without_a_label_gives_zero_and_leaves_the_weights_alone():
    module = kd(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    before = [p.clone() for p in module.student_spec.load(None, "student").parameters()]
    loss, gradient = fit_one_step(module, [ragged_batch([(3, 0), (2, 0)])] * 2)
    assert loss == 0
    assert gradient.abs().max().item() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True))


def test_biases_and_norms_do_not_decay():
    module = kd()
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=BatchList(cut(8)))
    matrices, vectors = fit.optimizers[0].param_groups
    assert all(p.ndim > 1 for p in matrices["params"])
    assert matrices["weight_decay"] > 0
    assert all(p.ndim == 1 for p in vectors["params"])
    assert vectors["weight_decay"] == 0


def test_the_cosine_ends_with_the_trainer():
    rates = []

    class Rates(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module = SFT(
        student=StudentSpec.of(tiny_llama(0)),
        optimizer=lambda groups: Rates(groups, lr=1.0),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=2, min_ratio=0.1),
    )
    trainer(max_steps=6, max_epochs=-1).fit(module, datamodule=BatchList(cut(4)))
    expected = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 5, "total_steps": 5}, "above warmup_steps, 5"),
        ({"min_ratio": 1.5}, r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_schedules_are_refused(arguments, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        WarmupCosine(optimizer, **arguments)


def test_bfloat16_mixed_precision_trains_with_float32_divergences():
    module = BabyLlama(
        student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1))
    )
    loss, gradient = fit_one_step(module, [ROWS], precision="bf16-mixed")
    exact, exact_gradient = fit_one_step(
        BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1))),
        [ROWS],
    )
    assert loss == pytest.approx(exact, rel=2e-2)
    assert torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99
