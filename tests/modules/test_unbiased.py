"""The expected gradient of every estimator, by writing down all texts, against autograd."""

from dataclasses import replace

import pytest

from lightning_kd.models import DenseLogits, SingleTeacher, Student
from lightning_kd.modules import GKD, MiniLLM, OnPolicyDistillation, Paper, RLDistillation
from lightning_kd.policy import CISPO, ImportanceSampling, PPOClip
from tests.modules.harness import BatchList, GradientProbe, trainer
from tests.modules.tabular import (
    Expectation,
    Prepared,
    Table,
    all_completions,
    everything_written,
    flat_gradient,
    kl_at,
    log_probs,
)


def expected_gradient(make, longest=3, alpha=0.0):
    """Through a real training step: the sum over all completions, weighed by their probability."""
    student, teacher = Table(0), Table(1)
    batch, probabilities = everything_written(student, teacher, longest, alpha)
    module = make(
        student=Student.of(student),
        teacher=SingleTeacher.of(teacher),
        logits=DenseLogits(),  # a table has no output head to take apart
        normalization=Expectation(probabilities),
    )
    probe = GradientProbe()
    fit = trainer(max_steps=1, callbacks=[Prepared(), probe], precision="64-true")
    fit.fit(module, datamodule=BatchList([batch]))
    return probe.gradient


def sequence_kl(longest=3):
    r"""The gradient of :math:`\sum_y q(y) [\log q(y) - \log p(y)]`."""
    student, teacher = Table(0), Table(1)
    total = 0
    for tokens in all_completions(longest):
        own, other = log_probs(student, tokens).sum(), log_probs(teacher, tokens).sum()
        total = total + own.exp() * (own - other.detach())
    return flat_gradient(total, student)


def token_kls(longest=3):
    """The gradient of the reverse KLs of single tokens, prefixes as they are."""
    student, teacher = Table(0), Table(1)
    total = 0
    prefixes = {tokens[:k] for tokens in all_completions(longest) for k in range(len(tokens))}
    for prefix in prefixes:
        reached = log_probs(student, prefix).sum().exp().detach() if prefix else 1.0
        total = total + reached * kl_at(student, teacher, prefix)
    return flat_gradient(total, student)


def close(got, expected):
    assert (got - expected).norm() <= 1e-10 * expected.norm()
    assert expected.norm() > 1e-2


@pytest.mark.parametrize("surrogate", [ImportanceSampling(), PPOClip(), CISPO()])
def test_with_discount_1_it_is_the_gradient_of_the_sequence_kl(surrogate):
    close(
        expected_gradient(lambda **k: OnPolicyDistillation(gamma=1.0, surrogate=surrogate, **k)),
        sequence_kl(),
    )


def test_with_discount_0_it_is_the_sum_of_the_token_kls():
    close(expected_gradient(OnPolicyDistillation), token_kls())


def test_the_full_vocabulary_is_the_same_in_expectation():
    close(expected_gradient(lambda **k: GKD(divergence="reverse_kl", **k)), token_kls())


SEQUENCE = replace(Paper(), length_norm="none")


def test_the_papers_single_step_form_is_the_gradient_of_the_sequence_kl():
    close(expected_gradient(lambda **k: MiniLLM(objective=SEQUENCE, **k)), sequence_kl())


def test_the_codes_return_counts_the_single_step_twice():
    """The return from the current token on has the single step in it already."""
    objective = replace(SEQUENCE, return_from="current")
    close(
        expected_gradient(lambda **k: MiniLLM(objective=objective, **k)),
        sequence_kl() + token_kls(),
    )


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_teacher_mixing_is_exact_at_the_first_step(alpha):
    """With one token there are no prefixes that the mixture reaches more often than the student."""
    unclipped = ImportanceSampling()

    def gradient(objective):
        make = lambda **k: MiniLLM(objective=objective, surrogate=unclipped, **k)  # noqa: E731
        return expected_gradient(make, longest=1, alpha=alpha)

    close(gradient(SEQUENCE), token_kls(longest=1))
    # The policy gradient of the current reward is another token KL: its weights are exact as well.
    close(gradient(replace(SEQUENCE, return_from="current")), 2 * token_kls(longest=1))


def letters(*, completions, **_):
    return [float(text.count("b") ** 2) for text in completions]


def test_a_reward_is_raised_along_its_own_gradient_and_the_divergence_lowered():
    """A baseline that is the same for all has no part in the expectation."""
    student = Table(0)
    expected_reward = sum(
        log_probs(student, tokens).sum().exp() * tokens.count(3) ** 2
        for tokens in all_completions(3)
    )
    of_reward = -flat_gradient(expected_reward, student)
    for alpha in (0.0, 0.3, 1.0):
        got = expected_gradient(
            lambda a=alpha, **k: RLDistillation(rewards=[letters], alpha=a, **k)
        )
        close(got, (1 - alpha) * of_reward + alpha * token_kls())
