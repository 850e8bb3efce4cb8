"""Every method's loss and gradient, against the formulas written out in plain torch on logits."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SFT, BabyLlama, SupervisedKD
from lightning_kd.normalization import ConstantLength
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.modules.partition_grid import build
from tests.support.harness import BatchList, GradientProbe, Letters, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (1, 3), (3, 7)])
BLOCKS = ragged_batch([(0, 8), (0, 8), (0, 8)])


def student_and_teachers():
    return tiny_llama(0), tiny_llama(1), tiny_llama(2)


def shifted(model, batch):
    """Logits and labels, shifted the way transformers does it."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1], batch["labels"][:, 1:]


def expected_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check(module, student, expected_loss, batch, **tolerance):
    """One step through the Trainer gives the loss and the gradient that were written out."""
    expected = expected_gradient(student, expected_loss)
    loss, gradient = fit_one_step(module, [batch])
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(loss), expected_loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, **tolerance)


def test_sft_is_the_loss_of_transformers():
    student, *_ = student_and_teachers()
    loss = student(
        BATCH["input_ids"], attention_mask=BATCH["attention_mask"], labels=BATCH["labels"]
    ).loss
    check(SFT(student=StudentSpec.of(student)), student, loss, BATCH)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_supervised_kd(alpha, temperature):
    student, teacher, _ = student_and_teachers()
    z, labels = shifted(student, BATCH)
    u, _ = shifted(teacher, BATCH)
    scored = labels != -100
    kl = F.kl_div(
        (z[scored] / temperature).log_softmax(-1),
        (u[scored].detach() / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    ce = F.cross_entropy(z[scored], labels[scored])
    module = SupervisedKD(
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        alpha=alpha,
        temperature=temperature,
    )
    loss = alpha * ce + (1 - alpha) * temperature**2 * kl.mean()
    check(module, student, loss, BATCH)


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_the_power_of_the_temperature_is_the_divergences(temperature):
    """Total variation shrinks with 1 / tau near equality, so its gradient keeps its size with tau."""
    student, teacher, _ = student_and_teachers()
    z, labels = shifted(student, BATCH)
    u, _ = shifted(teacher, BATCH)
    scored = labels != -100
    q, p = ((x[scored] / temperature).softmax(-1) for x in (z, u.detach()))
    loss = 0.4 * F.cross_entropy(z[scored], labels[scored])
    loss = loss + 0.6 * temperature * 0.5 * (p - q).abs().sum(-1).mean()
    module = SupervisedKD(
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        divergence="total_variation",
        alpha=0.4,
        temperature=temperature,
    )
    check(module, student, loss, BATCH)


def official_baby_llama(student, teachers, batch, alpha, temperature):
    """The loss of section 3 as its authors compute it: on all positions, KL divided by rows."""
    output = student(batch["input_ids"], labels=batch["labels"])
    mean = torch.stack([t(batch["input_ids"]).logits for t in teachers]).mean(0).detach()
    kl = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(output.logits / temperature, dim=-1), F.softmax(mean / temperature, dim=-1)
    )
    return alpha * output.loss + (1 - alpha) * temperature**2 * kl


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_baby_llama_reproduces_the_official_scale_on_unpadded_blocks(alpha, normalization):
    student, *teachers = student_and_teachers()
    loss = official_baby_llama(student, teachers, BLOCKS, alpha, 2.0)
    module = BabyLlama(
        student=StudentSpec.of(student),
        teacher=TeacherEnsemble([LocalTeacher.of(t) for t in teachers]),
        alpha=alpha,
        kl_scale="batchmean",
        normalization=normalization,
    )
    check(module, student, loss, BLOCKS, rtol=1e-4, atol=1e-5)


def ragged_baby_llama(student, teachers, normalization, alpha, temperature):
    """The two terms of ``BATCH`` row by row in float64: no padding, every real token in the KL."""
    sums, kls = [], []
    for ids, mask, labels in zip(
        BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"], strict=True
    ):
        row = ids[mask.bool()][None]
        z = student(row).logits[0]
        u = torch.stack([t(row).logits[0] for t in teachers]).mean(0).detach()
        p, q = (u / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum())
        targets = labels[mask.bool()][1:]
        sums.append(F.cross_entropy(z[:-1], targets, reduction="none", ignore_index=-100))
    labels = (BATCH["labels"][:, 1:] != -100).sum(-1)
    rows = torch.stack([value.sum() for value in sums])
    cross_entropy = {
        "token": rows.sum() / labels.sum(),
        "sequence": (rows / labels).mean(),
        "batch": rows.mean(),
        "constant": rows.mean() / 16,
    }[normalization]
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * sum(kls) / len(kls)


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("normalization", ["token", "sequence", "batch", "constant"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_official_scale_on_ragged_rows(alpha, normalization):
    """KL per row whatever the normalization of the cross-entropy; ``token`` is the official loss."""
    student, *teachers = (tiny_llama(seed).double() for seed in (0, 1, 2))
    loss = ragged_baby_llama(student, teachers, normalization, alpha, 2.0)
    expected = expected_gradient(student, loss)
    module = BabyLlama(
        student=StudentSpec.of(student),
        teacher=TeacherEnsemble([LocalTeacher.of(t) for t in teachers]),
        alpha=alpha,
        kl_scale="batchmean",
        normalization=ConstantLength(16) if normalization == "constant" else normalization,
    )
    got, gradient = fit_one_step(module, [BATCH], precision="64-true")
    assert got == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient - expected).norm() < 1e-10 * expected.norm()
    assert gradient.norm() > 1


def test_the_official_scale_over_tokens_is_refused_where_the_loader_does_not_tell_the_step():
    teacher = LocalTeacher.of(tiny_llama(1))
    module = BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=teacher, kl_scale="batchmean")
    with pytest.raises(ValueError, match="BabyLlama divides its term divergence by") as refusal:
        fit_one_step(module, [BATCH, BATCH])
    assert "LabeledRows() and others by that of TokenMean()" in str(refusal.value)
    assert "accumulate_grad_batches 2" in str(refusal.value)
    assert "a Listed does not tell what follows" in str(refusal.value)
    assert "set accumulate_grad_batches: 1, or set model.normalization: sequence" in str(
        refusal.value
    )
    assert module.global_step == 0


@pytest.mark.usefixtures("float64_norms")
def test_the_official_scale_over_tokens_does_not_depend_on_the_cut():
    """With the library's own loader, which tells the micro-batches of a step."""
    results = []
    for accumulate, batch_size in ((1, 8), (4, 2)):
        probe = GradientProbe()
        fit = trainer(
            accumulate_grad_batches=accumulate,
            max_steps=1,
            precision="64-true",
            callbacks=[probe],
        )
        module = build("baby_llama_batchmean", "token")
        fit.fit(module, datamodule=Letters(batch_size=batch_size))
        results.append((fit.callback_metrics["train/loss"].item(), probe.gradient))
    (loss, gradient), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other - gradient).norm() < 1e-10 * gradient.norm()


def test_the_official_scale_in_validation_has_both_counts():
    """However the set is cut, and without a ratio that only a gradient needs."""
    student, *teachers = (tiny_llama(seed) for seed in (0, 1, 2))
    loss = ragged_baby_llama(student, teachers, "token", 0.5, 2.0)
    module = BabyLlama(
        student=StudentSpec.of(student),
        teacher=TeacherEnsemble([LocalTeacher.of(t) for t in teachers]),
        kl_scale="batchmean",
    )
    pieces = [{k: v[rows] for k, v in BATCH.items()} for rows in (slice(0, 1), slice(1, 3))]
    (result,) = trainer(limit_test_batches=1.0).test(
        module, datamodule=BatchList([], evaluate=pieces), verbose=False
    )
    assert result["test/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_official_scale_is_the_token_scale_times_the_tokens_of_a_block():
    """Where the last position is masked too: KL summed over a row = row length times its mean."""
    student, *teachers = student_and_teachers()
    losses = {}
    for scale in ("token", "batchmean"):
        module = BabyLlama(
            student=StudentSpec.of(tiny_llama(0)),
            teacher=TeacherEnsemble([LocalTeacher.of(t) for t in teachers]),
            alpha=0.0,
            kl_scale=scale,
        )
        losses[scale], _ = fit_one_step(module, [BLOCKS])
    z = student(BLOCKS["input_ids"]).logits
    mean = torch.stack([t(BLOCKS["input_ids"]).logits for t in teachers]).mean(0)
    kl = F.kl_div(
        (z / 2).log_softmax(-1), (mean / 2).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert losses["token"] == pytest.approx(4 * kl[:, :-1].mean().item(), rel=1e-5)
    assert losses["batchmean"] == pytest.approx(4 * kl.sum(-1).mean().item(), rel=1e-5)


def test_identical_teachers_are_one_and_a_perfect_student_has_no_gradient():
    student, teacher, _ = student_and_teachers()
    ensemble = TeacherEnsemble([LocalTeacher.of(tiny_llama(1)), LocalTeacher.of(tiny_llama(1))])
    both = BabyLlama(student=StudentSpec.of(student), teacher=ensemble)
    one = BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(teacher))
    loss_both, gradient_both = fit_one_step(both, [BATCH])
    loss_one, gradient_one = fit_one_step(one, [BATCH])
    assert loss_both == pytest.approx(loss_one, rel=1e-6)
    torch.testing.assert_close(gradient_both, gradient_one, rtol=1e-4, atol=1e-6)
    same = SupervisedKD(
        student=StudentSpec.of(tiny_llama(1)), teacher=LocalTeacher.of(teacher), alpha=0.0
    )
    loss, gradient = fit_one_step(same, [BATCH])
    assert abs(loss) < 1e-9
    assert gradient.abs().max().item() < 1e-6


def test_wrong_values_are_refused_before_a_model_is_loaded():
    sources = {"student": StudentSpec("./never"), "teacher": LocalTeacher("./never")}
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        SupervisedKD(alpha=1.5, **sources)
    with pytest.raises(ValueError, match="temperature is 0"):
        SupervisedKD(temperature=0, **sources)
    with pytest.raises(ValueError, match="unknown divergence 'nope'; choose one of"):
        SupervisedKD(divergence="nope", **sources)
    with pytest.raises(ValueError, match="unknown kl_scale 'mean'"):
        BabyLlama(kl_scale="mean", **sources)
    with pytest.raises(ValueError, match="unknown normalization"):
        SFT(student=sources["student"], normalization="mean")


def test_gkd_says_that_nobody_generates(caplog):
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    with caplog.at_level("INFO"):
        fit_one_step(module, [BATCH])
    assert "GKD without the callback OnPolicyGeneration" in caplog.text
