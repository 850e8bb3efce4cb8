"""Groups, baselines and the two normalizations of RLDistillation, on rollouts of a real model."""

import itertools

import pytest
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import RLDistillation
from lightning_kd.normalization import ConstantLength
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import GradientProbe, Letters, trainer
from tests.support.toys import LETTERS, tiny_llama

ALPHA, LONGEST = 0.3, 6


def length(*, completions, **_):
    """Letters of each completion."""
    return [float(sum(letter in LETTERS for letter in text)) for text in completions]


class Kept(OnPolicyGeneration):
    """Keeps its rollouts."""

    def on_train_batch_end(self, *arguments):
        self.kept = self._rollouts
        super().on_train_batch_end(*arguments)


def step(batch_size=12, window=1, more=(), *, truncated="keep", group_size=4, **options):
    writing = Kept(
        generation=SamplingOptions(max_new_tokens=LONGEST),
        group_size=group_size,
        truncated=truncated,
        table_every=0,
    )
    probe = GradientProbe()
    module = RLDistillation(
        student=StudentSpec.of(tiny_llama(0).double()),
        teacher=LocalTeacher.of(tiny_llama(1).double()),
        rewards=[length],
        alpha=ALPHA,
        **options,
    )
    fit = trainer(
        max_steps=1,
        max_epochs=-1,
        accumulate_grad_batches=window,
        precision="64-true",
        callbacks=[writing, probe, *more],
    )
    fit.fit(module, datamodule=Letters(batch_size=batch_size))
    return writing.kept, fit, probe.gradient


def letters(batch):
    """Neither the end nor padding that was drawn is one."""
    return ((batch["input_ids"] >= 2) & batch["completion_mask"]).sum(-1)


def by_hand(batch, truncated):
    """Row by row: what a completion is worth beside the others of its prompt."""
    written = batch["completion_mask"]
    ended = ((batch["input_ids"] == 1) & written).any(-1).tolist()
    worth = letters(batch).tolist()
    advantages = []
    for row, group in enumerate(batch["group"].tolist()):
        others = [
            worth[other]
            for other, theirs in enumerate(batch["group"].tolist())
            if theirs == group and other != row and (ended[other] or truncated != "drop")
        ]
        trained = ended[row] or truncated == "keep"
        baseline = sum(others) / len(others) if others else 0.0
        advantages.append((worth[row] - baseline) * trained)
    return advantages, ended


@pytest.mark.parametrize("truncated", ["keep", "mask", "drop"])
def test_baselines_are_the_means_of_the_others(truncated):
    """A masked row counts in the others' baselines, a dropped one does not."""
    ((batch,), fit, _) = step(truncated=truncated)
    expected, ended = by_hand(batch, truncated)
    assert 0 < sum(ended) < 12
    scored = batch["labels"] != -100
    for row in range(12):
        assert scored[row].any() == (ended[row] or truncated == "keep")
        got = batch["advantages"][row]
        assert got[scored[row]].tolist() == pytest.approx([expected[row]] * int(scored[row].sum()))
        assert got[~scored[row]].abs().sum() == 0
    rewards = letters(batch).tolist()
    counted = [r for r, end in zip(rewards, ended, strict=True) if end or truncated != "drop"]
    assert fit.callback_metrics["train/reward"].item() == pytest.approx(sum(counted) / len(counted))


def test_one_that_is_left_of_its_group_has_its_reward_for_an_advantage():
    ((batch,), _, _) = step(truncated="drop", group_size=2)
    expected, ended = by_hand(batch, "drop")
    alone = [
        row for row in range(12)
        if ended[row] and not any(
            ended[other] for other in range(12)
            if other != row and batch["group"][other] == batch["group"][row]
        )
    ]  # fmt: skip
    assert alone
    for row in alone:
        assert expected[row] == letters(batch)[row]
        assert batch["advantages"][row].max() == letters(batch)[row]


def mean(values, normalization):
    """Of rows of token values, empty ones aside."""
    rows = [row for row in values if len(row)]
    sums = sum(row.sum() for row in rows)
    if normalization == "token":
        return sums / sum(map(len, rows))
    if normalization == "sequence":
        return sum(row.mean() for row in rows) / len(rows)
    return sums / len(rows) / (16 if normalization == "constant" else 1)


def made(name):
    return ConstantLength(16) if name == "constant" else name


NAMES = ["token", "sequence", "batch", "constant"]


CASES = [("keep", *names) for names in itertools.product(NAMES, NAMES)]
CASES += [
    (truncated, *names)
    for truncated in ("mask", "drop")
    for names in [("sequence", "batch"), ("token", "batch"), ("sequence", "token")]
]


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize(("truncated", "normalization", "of_reward"), CASES)
def test_each_term_has_its_normalization_in_every_cut(truncated, normalization, of_reward):
    """Fresh rollouts: the ratio is 1, and its slope that of the log-probability."""
    options = {
        "truncated": truncated,
        "normalization": made(normalization),
        "reward_normalization": made(of_reward),
    }
    ((batch,), fit, gradient) = step(**options)
    student, teacher = tiny_llama(0).double(), tiny_llama(1).double()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    q, p = (m(**inputs).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    p = p.detach()
    tokens = q.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    advantages, _ = by_hand(batch, truncated)
    scored = batch["labels"][:, 1:] != -100
    rewarded = [
        -advantage * (row - row.detach()).exp()[mask]
        for row, mask, advantage in zip(tokens, scored, advantages, strict=True)
    ]
    kls = [row[mask] for row, mask in zip((q.exp() * (q - p)).sum(-1), scored, strict=True)]
    loss = (1 - ALPHA) * mean(rewarded, of_reward) + ALPHA * mean(kls, normalization)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient - expected).norm() < 1e-9 * expected.norm()
    for batch_size, window in ((4, 3), (2, 6)) if truncated != "keep" else ((4, 3),):
        _, other, cut = step(batch_size, window, **options)
        assert (cut - gradient).norm() < 1e-10 * gradient.norm()
        for name in ("loss", "policy_gradient", "divergence"):
            assert other.callback_metrics[f"train/{name}"].item() == pytest.approx(
                fit.callback_metrics[f"train/{name}"].item(), rel=1e-6, abs=1e-7
            )


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 3])
def test_the_diagnostics_show_both_normalizations(window):
    _, fit, _ = step(12 // window, window, more=[LossNormalizationDiagnostics()])
    logged = {k.removeprefix("norm/"): v.item() for k, v in fit.callback_metrics.items()}
    tokens = logged["train/tokens"]
    assert logged["count"] == 12
    assert logged["terms_agree"] == 0
    # Divided by 12 rows, and as a mean of means.
    assert logged["policy_gradient/denominator"] == pytest.approx(12)
    assert logged["policy_gradient/weight"] == pytest.approx((1 - ALPHA) * tokens / 12)
    assert logged["divergence/denominator"] == pytest.approx(tokens)
    assert logged["divergence/weight"] == pytest.approx(ALPHA)
    # What the loss would be with another normalization of the divergence: the reward keeps its own.
    assert logged["loss_sequence"] == pytest.approx(logged["train/loss"], rel=1e-6)
    for name in ("token", "batch"):
        _, other, _ = step(12 // window, window, normalization=name)
        loss = other.callback_metrics["train/loss"].item()
        assert logged[f"loss_{name}"] == pytest.approx(loss, rel=1e-6)
    assert logged["train/loss"] == pytest.approx(
        (1 - ALPHA) * logged["train/policy_gradient"] + ALPHA * logged["train/divergence"]
    )


def test_terms_of_one_normalization_agree():
    _, fit, _ = step(
        more=[LossNormalizationDiagnostics()], normalization="token", reward_normalization="token"
    )
    assert fit.callback_metrics["norm/terms_agree"] == 1


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="unknown normalization 'rows'"):
        RLDistillation(
            student=StudentSpec("./never"),
            teacher=LocalTeacher("./never"),
            rewards=[length],
            reward_normalization="rows",
        )
