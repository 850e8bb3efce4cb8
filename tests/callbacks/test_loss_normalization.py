import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.fused import CrossEntropy, TokenLoss
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT, BabyLlama, DistillationModule, LossTerm, SupervisedKD
from lightning_kd.normalization import BatchMean, ConstantLength
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

LENGTHS = [(2, 5), (1, 3), (3, 7), (2, 1)]
BATCHES = [ragged_batch(LENGTHS[:2], seed=1), ragged_batch(LENGTHS[2:], seed=2)]


def logged(module, batches=BATCHES, **settings):
    fit = trainer(
        max_steps=1,
        accumulate_grad_batches=len(batches),
        callbacks=[LossNormalizationDiagnostics(histograms_every=1)],
        **settings,
    )
    fit.fit(module, datamodule=BatchList(batches))
    values = {k: v.item() for k, v in fit.callback_metrics.items()}
    return {k.removeprefix("norm/"): v for k, v in values.items() if k.startswith("norm/")}, values


def token_losses(model):
    """Return the cross-entropy of each row's tokens, as lists, from transformers' logits."""
    rows = []
    for batch in BATCHES:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nll = -logits[:, :-1].double().log_softmax(-1)
        labels = batch["labels"][:, 1:]
        for row, label in zip(nll, labels, strict=True):
            scored = label != -100
            rows.append(row[scored].gather(-1, label[scored][:, None])[:, 0].detach().numpy())
    return rows


@pytest.mark.parametrize("normalization", ["token", "sequence", ConstantLength(16)])
def test_the_statistics_equal_those_of_numpy(normalization):
    rows = token_losses(tiny_llama(0))
    norm, values = logged(SFT(student=StudentSpec.of(tiny_llama(0)), normalization=normalization))
    lengths = np.array([len(row) for row in rows])
    means = np.array([row.mean() for row in rows])
    expected = {
        "tokens": 16,
        "sequences": 4,
        "loss_token": np.concatenate(rows).mean(),
        "loss_sequence": means.mean(),
        "loss_batch": np.mean([row.sum() for row in rows]),
        "sequence_over_token": means.mean() / np.concatenate(rows).mean(),
        "length_loss_covariance": np.cov(lengths, means, bias=True)[0, 1],
        "padding_share": 1 - (7 + 4 + 10 + 3) / (2 * 7 + 2 * 10),
        "terms_agree": 1,
        "cross_entropy/weight": 1,
    }
    by_batch = [rows[:2], rows[2:]]
    if normalization == "token":
        micro = [np.concatenate(part).mean() for part in by_batch]
        expected |= {"count": 16, "count_min": 8, "count_max": 8}
        expected |= {"weight_min": 1 / 16, "weight_max": 1 / 16}
        true = expected["loss_token"]
    elif normalization == "sequence":
        micro = [np.mean([row.mean() for row in part]) for part in by_batch]
        expected |= {"count": 4, "weight_min": 1 / 7 / 4, "weight_max": 1 / 4}
        true = expected["loss_sequence"]
    else:
        micro = [sum(row.sum() for row in part) / 32 for part in by_batch]
        true = sum(row.sum() for row in rows) / 64
        expected |= {"count": 64, "loss_constant": true, "cross_entropy/weight": 16 / 64}
    expected["mean_of_means_error"] = abs(np.mean(micro) - true) / abs(true)
    assert {k: norm[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert values["train/loss"] == pytest.approx(true, rel=1e-5)


def test_a_mean_of_means_has_an_error_if_counts_differ():
    """The same rows in unequal micro-batches: of 5 + 3 + 7 tokens and of 1."""
    whole = ragged_batch([(2, 5), (1, 3), (3, 7)], seed=1)
    norm, _ = logged(SFT(student=StudentSpec.of(tiny_llama(0))), [whole, ragged_batch([(2, 1)])])
    assert (norm["count_min"], norm["count_max"]) == (1, 15)
    assert norm["mean_of_means_error"] > 0.01


def test_terms_with_the_same_normalization_agree():
    teacher = LocalTeacher.of(tiny_llama(1))
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, normalization="sequence"
    )
    assert logged(module)[0]["terms_agree"] == 1


class TwoNormalizations(SFT):
    """Half of each row's sum, and the mean over tokens, for 16 tokens in 4 rows."""

    terms = ("cross_entropy", "of_rows")

    def loss_terms(self, batch, scores):
        loss = CrossEntropy(scores.positions.targets)
        return {
            "cross_entropy": LossTerm(loss),
            "of_rows": LossTerm(loss, 0.5),
        }

    @property
    def term_normalizations(self):
        return {"of_rows": BatchMean()}

    def constant_count_ratios(self):
        return {"of_rows": 16 / 4}


def test_a_term_with_its_own_normalization_is_unaffected_by_the_others():
    rows = token_losses(tiny_llama(0))
    norm, values = logged(TwoNormalizations(student=StudentSpec.of(tiny_llama(0))))
    own = 0.5 * np.mean([row.sum() for row in rows])
    by_token, by_sequence = np.concatenate(rows).mean(), np.mean([row.mean() for row in rows])
    expected = {
        "loss_token": by_token + own,
        "loss_sequence": by_sequence + own,
        "loss_batch": np.mean([row.sum() for row in rows]) + own,
        "sequence_over_token": (by_sequence + own) / (by_token + own),
        "mean_of_means_error": 0,
        "terms_agree": 0,
    }
    assert {k: norm[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert values["train/loss"] == pytest.approx(by_token + own, rel=1e-5)


def test_terms_of_the_official_baby_llama_scale_do_not_agree():
    blocks = ragged_batch([(0, 8), (0, 8)])
    teacher = LocalTeacher.of(tiny_llama(1))
    module = BabyLlama(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher, alpha=0.5, kl_scale="batchmean"
    )
    norm, _ = logged(module, [blocks])
    assert norm["terms_agree"] == 0
    assert norm["cross_entropy/weight"] == pytest.approx(0.5)
    # (1 - alpha) tau^2 times the 7 labels of a block, against 0.5 for cross-entropy.
    assert norm["divergence/weight"] == pytest.approx(0.5 * 4 * 7)
    # Cross-entropy is divided by the 14 labels, the KL by the 2 rows.
    assert norm["cross_entropy/denominator"] == pytest.approx(14)
    assert norm["divergence/denominator"] == pytest.approx(2)


class PolicyGradient(DistillationModule):
    """The first iteration of a policy gradient: minus the advantage at every token of a row."""

    terms = ("policy",)

    def loss_terms(self, batch, scores):
        advantages = batch["advantages"][scores.positions.rows]

        def surrogate(log_probs, rows):
            return -(log_probs - log_probs.detach()).exp() * advantages[rows]

        return {"policy": LossTerm(TokenLoss(scores.positions.targets, surrogate))}


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_policy_gradient_identities(normalization):
    """Centered advantages: 0 under sequence, -Cov(length, advantage) / mean length under token."""
    batch = ragged_batch([(2, 5), (1, 3), (3, 7), (2, 1)])
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0])
    batch["advantages"] = rewards - rewards.mean()
    norm, values = logged(
        PolicyGradient(student=StudentSpec.of(tiny_llama(0)), normalization=normalization), [batch]
    )
    lengths = np.array([5, 3, 7, 1])
    advantages = batch["advantages"].numpy()
    covariance = np.cov(lengths, advantages, bias=True)[0, 1]
    expected = 0.0 if normalization == "sequence" else -covariance / lengths.mean()
    assert values["train/loss"] == pytest.approx(expected, abs=1e-6)
    assert values["train/grad_norm"] > 1e-3
    assert norm["length_loss_covariance"] == pytest.approx(-covariance, rel=1e-5)


def test_histograms_are_logged_to_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    logged(SFT(student=StudentSpec.of(tiny_llama(0))), logger=logger)
    seen = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    seen.Reload()
    (event,) = seen.Histograms("norm/completion_length")
    assert (event.histogram_value.min, event.histogram_value.max) == (1, 7)
    assert event.histogram_value.num == 4
    assert seen.Histograms("norm/sequence_loss")


def test_a_step_without_scored_tokens_is_logged():
    norm, _ = logged(SFT(student=StudentSpec.of(tiny_llama(0))), [ragged_batch([(3, 0), (2, 0)])])
    assert norm["tokens"] == norm["count"] == norm["loss_token"] == 0


def test_invalid_values_are_rejected():
    with pytest.raises(ValueError, match="histograms_every is -1"):
        LossNormalizationDiagnostics(histograms_every=-1)
