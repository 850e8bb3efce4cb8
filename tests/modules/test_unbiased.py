"""The expected gradient of every estimator, by writing down all texts, against autograd."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD, MiniLLM, OnPolicyDistillation, Paper, RLDistillation
from lightning_kd.normalization import ConstantLength
from lightning_kd.policy import CISPO, ImportanceSampling, PPOClip
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, GradientProbe, trainer
from tests.support.tabular import (
    Expectation,
    Prepared,
    Table,
    all_completions,
    everything_written,
    flat_gradient,
    kl_at,
    log_probs,
    next_log_probs,
)


def expected_gradient(make, longest=3, alpha=0.0):
    """Through a real training step: the sum over all completions, weighed by their probability."""
    student, teacher = Table(0), Table(1)
    batch, probabilities = everything_written(student, teacher, longest, alpha)
    module = make(
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        logits_backend=DenseLogits(),  # a table has no output head to take apart
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


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_the_mixture_is_in_the_ratio_and_the_reward_is_the_students(alpha, gamma):
    r"""The gradient of :math:`-\rho_t A_t`, summed over all texts with the mixture's probability."""
    student, teacher = Table(0), Table(1)
    total = 0
    for tokens in all_completions(3):
        own, other = log_probs(student, tokens), log_probs(teacher, tokens).detach()
        mixed = (1 - alpha) * own.detach().exp() + alpha * other.exp()
        for t in range(len(tokens)):
            later = (own.detach() - other)[t:]
            advantage = -sum(gamma**k * value for k, value in enumerate(later))
            total = total - mixed.prod() * own[t].exp() / mixed[t] * advantage
    make = lambda **k: OnPolicyDistillation(gamma=gamma, **k)  # noqa: E731
    close(expected_gradient(make, alpha=alpha), flat_gradient(total, student))


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_mixed_prefixes_have_the_token_kls_of_the_student(alpha):
    """Each token is weighed exactly: only how often a prefix is reached is the mixture's."""
    student, teacher = Table(0), Table(1)
    total = 0
    for prefix in {tokens[:k] for tokens in all_completions(3) for k in range(len(tokens))}:
        own, other = (log_probs(m, prefix).exp().detach() for m in (student, teacher))
        reached = ((1 - alpha) * own + alpha * other).prod() if prefix else 1.0
        total = total + reached * kl_at(student, teacher, prefix)
    close(expected_gradient(OnPolicyDistillation, alpha=alpha), flat_gradient(total, student))


def towards(tokens, strength):
    """What a completion's tokens are rewarded by: ``lambda log p + (1 - lambda) log p_0``, each."""
    teacher, reference = (log_probs(Table(seed), tokens).detach() for seed in (1, 2))
    return strength * teacher + (1 - strength) * reference


@pytest.mark.parametrize("strength", [0.5, 1.25, 2.0])
def test_extrapolated_over_sequences(strength):
    r"""The gradient of :math:`\sum_y q(y) [\log q / p_0 - \lambda \log p / p_0]`."""
    student, total = Table(0), 0
    for tokens in all_completions(3):
        own = log_probs(student, tokens).sum()
        total = total + own.exp() * (own - towards(tokens, strength).sum())
    make = lambda **k: OnPolicyDistillation(  # noqa: E731
        gamma=1.0, reference=LocalTeacher.of(Table(2)), extrapolation=strength, **k
    )
    close(expected_gradient(make), flat_gradient(total, student))


def test_extrapolated_over_tokens():
    """At every prefix: :math:`KL(q, p_0) - \\lambda\\, E_q \\log (p / p_0)`, of all tokens."""
    student, total = Table(0), 0
    for prefix in {tokens[:k] for tokens in all_completions(3) for k in range(len(tokens))}:
        reached = log_probs(student, prefix).sum().exp().detach() if prefix else 1.0
        own, teacher, reference = (next_log_probs(m, prefix) for m in (student, Table(1), Table(2)))
        reward = 1.25 * (teacher - reference).detach() - (own - reference.detach())
        total = total - reached * (own.exp() * reward).sum()
    make = lambda **k: OnPolicyDistillation(reference=LocalTeacher.of(Table(2)), **k)  # noqa: E731
    close(expected_gradient(make), flat_gradient(total, student))


# A reward of whole completions, in groups.


def letters(*, completions, **_):
    return [float(text.count("b") ** 2) for text in completions]


class Groups(Callback):
    """Sums the gradients of a run's steps, each a group, times the groups' probabilities."""

    def __init__(self, probabilities) -> None:
        self.probabilities, self.gradient = probabilities, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.gradient = self.gradient + (
            self.probabilities[batch_idx] * pl_module.student.rows.grad.flatten()
        )


def expected_gradient_over_groups(size, longest, **options):
    """One real step for each group of completions that can be sampled, in any order."""
    student, teacher = Table(0), Table(1)
    batch, probabilities = everything_written(student, teacher, longest)
    groups = list(itertools.combinations_with_replacement(range(len(probabilities)), size))
    orders = [
        math.factorial(size) / math.prod(map(math.factorial, Counter(group).values()))
        for group in groups
    ]
    likely = [n * probabilities[list(g)].prod() for g, n in zip(groups, orders, strict=True)]
    assert sum(likely).item() == pytest.approx(1, abs=1e-12)
    summed = Groups(likely)
    fit = trainer(max_steps=len(groups), callbacks=[Prepared(), summed], precision="64-true")
    module = RLDistillation(
        rewards=[letters],
        student=StudentSpec.of(student),
        teacher=LocalTeacher.of(teacher),
        logits_backend=DenseLogits(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
        **options,
    )
    fit.fit(module, datamodule=BatchList([picked(batch, list(group)) for group in groups]))
    return summed.gradient


def picked(batch, rows):
    return {
        name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows]
        for name, value in batch.items()
    }


def raised_reward(longest):
    """Minus the gradient of the expected reward."""
    student = Table(0)
    expected = sum(
        log_probs(student, tokens).sum().exp() * tokens.count(3) ** 2
        for tokens in all_completions(longest)
    )
    return -flat_gradient(expected, student)


def mean_token_kls(longest):
    """The gradient of each text's mean reverse KL, no gradient through the sampling."""
    student, teacher = Table(0), Table(1)
    total = 0
    for tokens in all_completions(longest):
        likely = log_probs(student, tokens).sum().exp().detach()
        kls = [kl_at(student, teacher, tokens[:k]) for k in range(len(tokens))]
        total = total + likely * sum(kls) / len(kls)
    return flat_gradient(total, student)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "longest"), [(1, 3), (2, 3), (4, 2)])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:every prompt has one completion")
def test_the_defaults_are_equation_5(size, longest, alpha):
    expected = (1 - alpha) * raised_reward(longest) + alpha * mean_token_kls(longest)
    close(expected_gradient_over_groups(size, longest, alpha=alpha), expected)


def test_a_group_mean_with_the_completion_itself_would_be_short_by_half():
    """The oracle can tell: what a baseline over all of a group of 2 would give."""
    half = 0.5 * raised_reward(2)
    got = expected_gradient_over_groups(2, 2, alpha=0.0)
    assert (got - half).norm() > 0.4 * got.norm()


def test_a_constant_length_divides_the_reward_by_it_and_leaves_the_divergence():
    got = expected_gradient_over_groups(
        2, 2, alpha=0.5, reward_normalization=ConstantLength(5), normalization="sequence"
    )
    close(got, 0.5 * raised_reward(2) / 5 + 0.5 * mean_token_kls(2))
