import math

import pytest
import scipy.special
import torch

from lightning_kd.models import DenseLogits, ModelSpec
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, TeacherEnsemble
from tests.support.toys import ragged_batch, tiny_llama

CPU = torch.device("cpu")


def logits(members: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        3 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(members)
    )


def given(teacher, batch, scored):
    """The logits of its only model."""
    (source,) = teacher.answer(batch, scored, logits_backend=DenseLogits()).sources
    return source.logits


def members(count: int) -> list[ModelSpec]:
    return [ModelSpec.of(tiny_llama(seed)) for seed in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("combine", ["logits", "probabilities", "log_probs"])
def test_an_ensemble_is_the_mean_it_says(combine, weights, temperature):
    u = [x.numpy() / temperature for x in logits()]
    w = [1 / 3] * 3 if weights is None else [x / sum(weights) for x in weights]
    if combine == "probabilities":
        expected = sum(k * scipy.special.softmax(x, axis=-1) for k, x in zip(w, u, strict=True))
    elif combine == "logits":
        expected = scipy.special.softmax(sum(k * x for k, x in zip(w, u, strict=True)), axis=-1)
    else:
        geometric = 1.0
        for k, x in zip(w, u, strict=True):
            geometric = geometric * scipy.special.softmax(x, axis=-1) ** k
        expected = geometric / geometric.sum(-1, keepdims=True)
    ensemble = TeacherEnsemble(members(3), combine=combine, weights=weights)
    torch.testing.assert_close(
        ensemble.log_probs(logits(), temperature).exp(),
        torch.from_numpy(expected),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("combine", ["logits", "probabilities", "log_probs"])
def test_identical_members_are_one_teacher(combine):
    (one,) = logits(1)
    ensemble = TeacherEnsemble(members(2), combine=combine)
    torch.testing.assert_close(
        ensemble.log_probs((one, one), 2.0), (one / 2).log_softmax(-1), rtol=1e-12, atol=1e-12
    )


def test_a_teacher_is_frozen_and_in_eval_mode(tokenizer):
    teacher = LocalTeacher.of(tiny_llama(attention_dropout=0.5))
    teacher.prepare(tokenizer, CPU, "equal")
    (model,) = teacher.models
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    batch = ragged_batch([(2, 5), (3, 2)])
    scored = ScoredPositions.from_labels(batch["labels"])
    scores = given(teacher, batch, scored)
    assert scores.shape == (7, 18)
    assert not scores.requires_grad


def test_scores_do_not_depend_on_padding(tokenizer):
    teacher = LocalTeacher.of(tiny_llama())
    teacher.prepare(tokenizer, CPU, "equal")
    both = ragged_batch([(2, 5), (3, 2)])
    scored = ScoredPositions.from_labels(both["labels"])
    padded = given(teacher, both, scored)
    alone = {key: value[1:, :5] for key, value in both.items() if key != "row"}
    scored_alone = ScoredPositions.from_labels(alone["labels"])
    unpadded = given(teacher, alone, scored_alone)
    torch.testing.assert_close(padded[5:], unpadded, rtol=0, atol=1e-5)


def test_wrong_ensembles_are_refused():
    with pytest.raises(ValueError, match="at least one member"):
        TeacherEnsemble([])
    with pytest.raises(ValueError, match="2 weights came for 3 members"):
        TeacherEnsemble(members(3), weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="not all 0"):
        TeacherEnsemble(members(2), weights=[0.0, 0.0])
    with pytest.raises(ValueError, match="0 or more"):
        TeacherEnsemble(members(2), weights=[math.nan, 1.0])
    with pytest.raises(ValueError, match="choose one of"):
        TeacherEnsemble(members(2), combine="mean")
