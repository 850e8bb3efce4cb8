"""Averages of teachers of any kind, beside SciPy."""

import math

import pytest
import scipy.special
import torch

from lightning_kd.fused import FullDistribution, MaterializedLogits, TokenLogProbs
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD, BabyLlama, OnPolicyDistillation
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, Teacher, TeacherEnsemble
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 4), (1, 2)]))
SCORED = ScoredPositions.from_labels(BATCH["labels"])
COMBINE = ["logits", "probabilities", "log_probs"]
WEIGHTS = [None, [1.0, 2.0, 5.0], [0.0, 1.0, 1.0]]


class Noted(Teacher):
    """Logits that somebody wrote down."""

    answers = frozenset({"full_distribution"})

    def __init__(self, logits):
        self.logits = logits

    @property
    def vocabulary_size(self):
        return self.logits.shape[1]

    def answer(self, batch, positions, *, kind, logits_backend):
        return FullDistribution((MaterializedLogits(self.logits),))


class OneToken(Teacher):
    """Probabilities of single tokens."""

    answers = frozenset({"token_log_probs"})
    vocabulary_size = 18

    def __init__(self, logits):
        self.log_probs = logits.log_softmax(-1)
        self.vocabulary_size = logits.shape[1]

    def answer(self, batch, positions, *, kind, logits_backend):
        return TokenLogProbs(self.log_probs.gather(-1, positions.targets[:, None])[:, 0])


def noted(count=3, width=11):
    generator = torch.Generator().manual_seed(0)
    positions = len(SCORED.targets)
    return [
        3 * torch.randn(positions, width, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def log_probs(teacher, temperature):
    answer = teacher.answer(BATCH, SCORED, kind="full_distribution", logits_backend=DenseLogits())
    everything = slice(0, len(SCORED.targets))
    logits = [source.logits for source in answer.sources]
    return answer.rows(everything, logits, teacher.vocabulary_size).log_probs(temperature)


def averaged(combine, weights, temperature, logits):
    u = [x.numpy() / temperature for x in logits]
    w = [1 / len(u)] * len(u) if weights is None else [x / sum(weights) for x in weights]
    if combine == "probabilities":
        return sum(k * scipy.special.softmax(x, axis=-1) for k, x in zip(w, u, strict=True))
    if combine == "logits":
        return scipy.special.softmax(sum(k * x for k, x in zip(w, u, strict=True)), axis=-1)
    geometric = 1.0
    for k, x in zip(w, u, strict=True):
        geometric = geometric * scipy.special.softmax(x, axis=-1) ** k
    return geometric / geometric.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("combine", COMBINE)
def test_an_ensemble_is_the_mean_that_it_names(combine, weights, temperature):
    ensemble = TeacherEnsemble([*map(Noted, noted())], combine=combine, weights=weights)
    expected = averaged(combine, weights, temperature, noted())
    torch.testing.assert_close(
        log_probs(ensemble, temperature).exp(), torch.from_numpy(expected), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("inner", COMBINE)
@pytest.mark.parametrize("combine", COMBINE)
def test_an_ensemble_in_an_ensemble_counts_with_its_own_distribution(combine, inner, temperature):
    first, second, third = noted()
    pair = TeacherEnsemble([Noted(first), Noted(second)], combine=inner, weights=[1.0, 3.0])
    ensemble = TeacherEnsemble([pair, Noted(third)], combine=combine, weights=[2.0, 1.0])
    of_pair = averaged(inner, [1.0, 3.0], temperature, [first, second])
    of_third = scipy.special.softmax(third.numpy() / temperature, axis=-1)
    if combine == "probabilities":
        expected = (2 * of_pair + of_third) / 3
    else:
        expected = of_pair ** (2 / 3) * of_third ** (1 / 3)
        expected /= expected.sum(-1, keepdims=True)
    torch.testing.assert_close(
        log_probs(ensemble, temperature).exp(), torch.from_numpy(expected), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("combine", COMBINE)
def test_identical_members_are_one_teacher(combine):
    (one,) = noted(1)
    ensemble = TeacherEnsemble([Noted(one), Noted(one)], combine=combine)
    torch.testing.assert_close(
        log_probs(ensemble, 2.0), (one / 2).log_softmax(-1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("combine", COMBINE)
def test_a_third_partys_teacher_beside_a_local_one(combine):
    """The loss of a whole step, from the distributions written down."""
    network = tiny_llama(1).double()
    (other,) = noted(1, 18)
    ensemble = TeacherEnsemble([LocalTeacher.of(network), Noted(other)], combine=combine)
    student = StudentSpec.of(tiny_llama(0).double())
    module = GKD(student=student, teacher=ensemble, divergence="forward_kl")
    loss, gradient = fit_one_step(module, [BATCH])
    with torch.no_grad():
        z, u = (
            model(BATCH["input_ids"], BATCH["attention_mask"]).logits[SCORED.mask]
            for model in (tiny_llama(0).double(), network)
        )
    p = averaged(combine, None, 1.0, [u, other])
    expected = scipy.special.rel_entr(p, z.softmax(-1).numpy()).sum(-1).mean()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()


def test_probabilities_of_single_tokens_are_averaged_exactly():
    logits = noted(2, 18)
    ensemble = TeacherEnsemble(
        [*map(OneToken, logits)], combine="probabilities", weights=[1.0, 3.0]
    )
    assert ensemble.answers == {"token_log_probs"}
    answer = ensemble.answer(BATCH, SCORED, kind="token_log_probs", logits_backend=DenseLogits())
    p = torch.from_numpy(averaged("probabilities", [1.0, 3.0], 1.0, logits))
    expected = p.gather(-1, SCORED.targets[:, None])[:, 0].log()
    torch.testing.assert_close(answer.values, expected, rtol=1e-12, atol=1e-12)
    module = OnPolicyDistillation(student=StudentSpec.of(tiny_llama(0)), teacher=ensemble)
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    assert all(math.isfinite(value) for value in shown.values())


def test_wrong_ensembles_are_refused():
    with pytest.raises(ValueError, match="members is a generator; give a list of teachers"):
        TeacherEnsemble(teacher for teacher in ())
    members = [*map(Noted, noted())]
    with pytest.raises(ValueError, match="TeacherEnsemble needs at least one member; got none"):
        TeacherEnsemble([])
    with pytest.raises(ValueError, match="member 0 of TeacherEnsemble is a int; give the name"):
        TeacherEnsemble([3])
    with pytest.raises(ValueError, match="2 weights came for 3 members"):
        TeacherEnsemble(members, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="not all 0"):
        TeacherEnsemble(members, weights=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="0 or more"):
        TeacherEnsemble(members, weights=[math.nan, 1.0, 1.0])
    with pytest.raises(ValueError, match="choose one of"):
        TeacherEnsemble(members, combine="mean")


@pytest.mark.parametrize("combine", COMBINE)
def test_answers_that_cannot_be_averaged_are_refused_by_member(combine):
    single = OneToken(noted(1, 18)[0])
    mixed = [single, *map(Noted, noted(1, 18))]
    with pytest.raises(ValueError, match=r"0 \(OneToken\) answers token_log_probs, 1 \(Noted\)"):
        TeacherEnsemble(mixed, combine=combine)
    if combine != "probabilities":
        with pytest.raises(ValueError, match="averaged with combine: probabilities"):
            TeacherEnsemble([single, single], combine=combine)


def test_a_method_that_needs_distributions_refuses_an_ensemble_of_single_tokens():
    single = OneToken(noted(1, 18)[0])
    teacher = TeacherEnsemble([single, single], combine="probabilities")
    module = BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    message = "BabyLlama needs .* TeacherEnsemble answers token_log_probs.* LocalTeacher"
    with pytest.raises(ValueError, match=message):
        fit_one_step(module, [BATCH])


def test_probabilities_over_unequal_vocabularies_are_not_averaged():
    """Over the tokens that both know, the wider member's are not known."""
    members = [OneToken(noted(1, width)[0]) for width in (18, 25)]
    ensemble = TeacherEnsemble(members, combine="probabilities")
    with pytest.raises(ValueError, match=r"\(0 18, 1 25\), and the answer token_log_probs"):
        ensemble.answer(BATCH, SCORED, kind="token_log_probs", logits_backend=DenseLogits())


def test_weights_are_compared_as_shares_when_a_run_is_resumed():
    members = [OneToken(noted(1)[0]) for _ in range(2)]

    def shares(weights):
        made = TeacherEnsemble(members, combine="probabilities", weights=weights)
        return made.resume_settings()["weights"]

    assert shares(None) == shares([1.0, 1.0]) == shares([3.0, 3.0])
    assert shares([1.0, 2.0]) == shares([2.0, 4.0]) != shares([2.0, 1.0])
