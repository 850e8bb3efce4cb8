"""A teacher in the process that tells k tokens, beside SciPy."""

import numpy as np
import pytest
import scipy.special
import torch

from lightning_kd.fused import TopK, TopKAndToken
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, TeacherEnsemble, TopKTeacher
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 4), (1, 2)])
SCORED = ScoredPositions.from_labels(BATCH["labels"])


def answered(kind, k=3, temperatures=None):
    teacher = TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=k, temperatures=temperatures)
    teacher.prepare(letter_tokenizer(), torch.device("cpu"), "equal")
    answer = teacher.answer(BATCH, SCORED, kind=kind, logits_backend=DenseLogits())
    answer.check(len(SCORED.targets), teacher.vocabulary_size)
    return answer


def log_probs(temperature=1.0):
    with torch.no_grad():
        logits = tiny_llama(1)(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    return scipy.special.log_softmax(logits[SCORED.mask].double().numpy() / temperature, axis=-1)


@pytest.mark.parametrize("kind", ["top_k", "top_k_and_token"])
def test_it_tells_the_most_likely_tokens_and_the_rest(kind):
    answer, expected = answered(kind, temperatures=[1.0, 2.0]), log_probs()
    assert type(answer) is {"top_k": TopK, "top_k_and_token": TopKAndToken}[kind]
    best = np.argsort(-expected, axis=-1)[:, :3]
    assert (answer.token_ids.numpy() == best).all()
    np.testing.assert_allclose(
        answer.log_probs.numpy(), np.take_along_axis(expected, best, -1), rtol=1e-5
    )
    for temperature in (1.0, 2.0):
        tempered = np.exp(log_probs(temperature))
        rest = 1 - np.take_along_axis(tempered, best, -1).sum(-1)
        np.testing.assert_allclose(answer.tail_log_probs[temperature].exp().numpy(), rest, 1e-4)
    if kind == "top_k_and_token":
        own = np.take_along_axis(expected, SCORED.targets.numpy()[:, None], -1)[:, 0]
        np.testing.assert_allclose(answer.label_log_probs.numpy(), own, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_of_unequal_vocabularies_it_tells_the_tokens_that_all_members_have(k):
    """The mean of two distributions, of which one knows more tokens, beside SciPy."""
    networks = tiny_llama(1, vocab_size=18), tiny_llama(2, vocab_size=25)
    members = TeacherEnsemble([LocalTeacher.of(n) for n in networks], combine="probabilities")
    teacher = TopKTeacher(members, k=k)
    teacher.prepare(letter_tokenizer(), torch.device("cpu"), "shared")
    answer = teacher.answer(BATCH, SCORED, kind="top_k", logits_backend=DenseLogits())
    answer.check(len(SCORED.targets), 18)
    shared = []
    for network in networks:
        with torch.no_grad():
            logits = network(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
        shared.append(scipy.special.softmax(logits[SCORED.mask].double().numpy()[:, :18], axis=-1))
    expected = (shared[0] + shared[1]) / 2
    best = np.argsort(-expected, axis=-1)[:, :k]
    assert (answer.token_ids.numpy() == best).all()
    named = np.take_along_axis(expected, best, -1)
    np.testing.assert_allclose(answer.log_probs.exp().numpy(), named, rtol=1e-5)
    np.testing.assert_allclose(answer.tail_log_probs[1.0].exp(), 1 - named.sum(-1), rtol=1e-4)


def one_step(teacher, **options):
    module = GKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=teacher,
        divergence="reverse_kl",
        **options,
    )
    return fit_one_step(module, [BATCH])


def test_all_tokens_are_the_whole_distribution():
    whole = one_step(LocalTeacher.of(tiny_llama(1)))
    all_named = one_step(TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=18))
    assert all_named[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(all_named[1], whole[1], rtol=1e-4, atol=1e-6)


def test_a_temperature_that_is_not_told_is_refused():
    teacher = TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=3)
    with pytest.raises(ValueError, match=r"model.teacher_temperature is 2.0, but TopKTeacher"):
        one_step(teacher, teacher_temperature=2.0)


def test_more_tokens_than_there_are_are_refused():
    with pytest.raises(ValueError, match="k is 19; the teacher knows 18 tokens"):
        one_step(TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=19))


def test_a_teacher_that_tells_k_tokens_takes_part_in_a_route():
    member = TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=3)
    assert RoutedTeacher({"a": member}).answers == {"top_k", "top_k_and_token"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; it is a number of tokens"),
        ({"k": 2, "temperatures": []}, "temperatures are \\[\\]; give one or more"),
        ({"k": 2, "temperatures": [0.0]}, "all positive"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TopKTeacher(LocalTeacher("./never"), **options)


def test_a_teacher_that_tells_less_is_refused():
    short = TopKTeacher(LocalTeacher("./never"), k=4)
    with pytest.raises(
        ValueError, match=r"answers full_distribution; whole \(TopKTeacher\) answers"
    ):
        TopKTeacher(short, k=2)


def test_a_whole_run_of_gkd_learns_from_it():
    teacher = TopKTeacher(LocalTeacher.of(tiny_llama(1)), k=3)
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    fit = trainer(max_steps=2)
    fit.fit(module, datamodule=BatchList([BATCH, BATCH]))
    assert fit.callback_metrics["train/top_k_forward_kl"] > 0
