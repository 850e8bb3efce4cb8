"""Only the positions at which the student is least sure: which, and what the loss is divided by."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.fused import MaterializedLogits, RoutedLogits, picked
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD, SupervisedKD
from lightning_kd.scoring import ScoredPositions, highest_in_rows
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, Letters, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama

LENGTHS = [(2, 5), (1, 3), (3, 10), (2, 1), (3, 0)]
BATCH = ragged_batch(LENGTHS)


def module(method=SupervisedKD, **options):
    return method(
        student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)), **options
    )


def chosen_by_numpy(logits, share):
    """The labeled positions of each row with the highest entropy."""
    entropies = entropy(logits.softmax(-1).detach().numpy(), axis=-1)
    labeled = (BATCH["labels"][:, 1:] != -100).numpy()
    chosen = np.zeros_like(labeled)
    for row, places in enumerate(labeled):
        (where,) = places.nonzero()
        best = where[np.argsort(-entropies[row, where])]
        chosen[row, best[: math.ceil(round(share * len(where), 6))]] = True
    return torch.from_numpy(chosen)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("backend", [None, DenseLogits()])
def test_loss_and_gradient_are_those_of_the_chosen_positions(share, normalization, backend):
    """Cross-entropy and forward KL, in plain torch on all logits."""
    student, teacher = tiny_llama(0), tiny_llama(1)
    z, u = (
        m(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[:, :-1]
        for m in (student, teacher)
    )
    chosen = chosen_by_numpy(z, share)
    counts = chosen.sum(-1)
    assert counts.tolist() == [math.ceil(round(share * c, 6)) for _, c in LENGTHS]
    p, q = u.detach().log_softmax(-1), z.log_softmax(-1)
    labels = BATCH["labels"][:, 1:].clamp(min=0)
    nll = -q.gather(-1, labels[..., None])[..., 0]
    per_token = (0.3 * nll + 0.7 * (p.exp() * (p - q)).sum(-1)) * chosen
    loss = per_token.sum() / counts.sum()
    if normalization == "sequence":
        loss = (per_token.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum()
    loss.backward()
    expected = torch.cat([w.grad.flatten() for w in student.parameters()])
    built = module(
        position_share=share, alpha=0.3, normalization=normalization, logits_backend=backend
    )
    found, gradient = fit_one_step(built, [BATCH])
    assert found == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_all_of_them_is_the_method_itself_and_validation_always_is():
    plain, all_of_them = (fit_one_step(module(**o), [BATCH]) for o in ({}, {"position_share": 1.0}))
    assert plain[0] == all_of_them[0]
    assert torch.equal(plain[1], all_of_them[1])
    # With a share that rounds up to all positions of every row, by the other path.
    nearly = fit_one_step(module(position_share=0.99), [BATCH])
    assert nearly[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(nearly[1], plain[1], rtol=1e-5, atol=1e-7)
    values = [
        trainer(limit_val_batches=1).validate(
            module(**options), datamodule=BatchList([], [BATCH]), verbose=False
        )
        for options in ({}, {"position_share": 0.2})
    ]
    assert values[0] == values[1]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [(1, 4), (2, 2), (4, 1)])
def test_the_diagnostics_count_what_takes_part_and_find_no_fault(cut):
    window, size = cut
    rows = [
        {name: tensor[start : start + size] for name, tensor in BATCH.items()}
        for start in range(0, 4, size)
    ]
    diagnostics = LossNormalizationDiagnostics(audit="first", on_fault="raise", histograms_every=0)
    fit = trainer(accumulate_grad_batches=window, max_steps=1, callbacks=[diagnostics])
    fit.fit(module(position_share=0.5, alpha=0.0), datamodule=BatchList(rows))
    logged = fit.callback_metrics
    taking_part = sum(math.ceil(0.5 * count) for _, count in LENGTHS[:4])
    assert logged["norm/count"] == logged["norm/tokens"] == taking_part
    assert logged["train/tokens"] == taking_part
    assert logged["norm/divergence/denominator"] == taking_part
    assert logged["norm/terms_agree"] == 1


def test_on_policy_the_recorded_log_probabilities_are_those_of_the_chosen_tokens():
    writing = OnPolicyGeneration(generation=SamplingOptions(max_new_tokens=6), table_every=0)
    fit = trainer(max_steps=1, max_epochs=-1, callbacks=[writing])
    fit.fit(module(GKD, position_share=0.3), datamodule=Letters(batch_size=4))
    assert fit.callback_metrics["rollout/log_prob_difference_max"] < 1e-4
    assert fit.callback_metrics["train/loss"] > 0


class KnowsSome(LocalTeacher):
    answers_any_text = False


def test_what_cannot_be_chosen_is_refused():
    for share in (0.0, 1.5, -1):
        with pytest.raises(ValueError, match=f"position_share is {share}; it is a share"):
            module(position_share=share)
    built = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=KnowsSome(config={"model_type": "llama", "hidden_size": 16}),
        position_share=0.5,
    )
    with pytest.raises(ValueError, match=r"model\.position_share is 0\.5, and KnowsSome knows"):
        fit_one_step(built, [BATCH])
    one = MaterializedLogits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="positions of RoutedLogits cannot be picked"):
        picked(RoutedLogits((one,), torch.zeros(2)), torch.tensor([True, False]))


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 1.0])
def test_every_row_keeps_its_share_also_where_values_are_equal(share):
    labels = ragged_batch([(1, n) for n in (30, 0, 3, 1, 10)])["labels"]
    scored = ScoredPositions.from_labels(labels)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (len(scored.targets),), generator=generator).float()
    kept = highest_in_rows(values, scored, share)
    for row, count in enumerate(scored.tokens_per_row.tolist()):
        own = values[scored.rows == row].numpy()
        order = np.argsort(-own, kind="stable")[: math.ceil(round(share * count, 6))]
        assert sorted(order) == kept[scored.rows == row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("share", ["1e-10", "0.07", "0.1", "0.2", "0.3", "0.35", "0.55", "0.7"])
def test_the_share_is_rounded_up_and_never_round_off(share):
    """Exactly: 0.1 of 30 positions are 3, though 0.1 * 30 is above 3 in binary."""
    lengths = range(1, 101)
    scored = ScoredPositions.from_labels(ragged_batch([(1, n) for n in lengths])["labels"])
    values = torch.rand(len(scored.targets), generator=torch.Generator().manual_seed(0))
    kept = scored.scattered(highest_in_rows(values, scored, float(share)).long()).sum(-1)
    assert kept.tolist() == [math.ceil(Fraction(share) * n) for n in lengths]
