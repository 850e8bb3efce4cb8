"""The corrected reverse KL: its expected gradient by writing down all texts, against autograd."""

import pytest
import torch

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import TopKAndToken
from lightning_kd.generation import Completions, Engine, SamplingOptions
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import GKD, CorrectedTopK, OnPolicyDistillation, SampledToken
from lightning_kd.policy import CISPO, ImportanceSampling, PPOClip
from lightning_kd.teachers import LocalTeacher, Teacher, TopKTeacher
from tests.support.harness import BatchList, GradientProbe, Letters, trainer
from tests.support.tabular import (
    TOKENS,
    Expectation,
    Naming,
    Prepared,
    Table,
    all_completions,
    everything_written,
    flat_gradient,
    kl_at,
    log_probs,
    next_log_probs,
)
from tests.support.toys import tiny_llama

PREFIXES = sorted({tokens[:k] for tokens in all_completions(3) for k in range(len(tokens))})


def step(make, *, k=1, writer=0, alpha=0.0, temperature=1.0, temperatures=(1.0,), teacher=None):
    """One step on all completions, each weighed by how likely its writer says it."""
    batch, probabilities = everything_written(
        Table(writer), Table(1), alpha=alpha, temperature=temperature
    )
    module = make(
        student=StudentSpec.of(Table(0)),
        teacher=teacher or Naming(Table(1), k, temperatures),
        logits_backend=DenseLogits(),  # a table has no output head to take apart
        normalization=Expectation(probabilities),
    )
    probe = GradientProbe()
    fit = trainer(max_steps=1, callbacks=[Prepared(), probe], precision="64-true")
    fit.fit(module, datamodule=BatchList([batch]))
    return probe.gradient, fit


def expected_gradient(make, **options):
    return step(make, **options)[0]


def corrected(**options):
    return lambda **k: OnPolicyDistillation(estimator=CorrectedTopK(), **options, **k)


def corrected_gkd(**options):
    return lambda **k: GKD(divergence="reverse_kl", estimator=CorrectedTopK(), **options, **k)


def reached(prefix, writer=0, alpha=0.0, temperature=1.0):
    """How often what has written gets to a prefix."""
    if not prefix:
        return torch.ones((), dtype=torch.float64)
    own, other = (log_probs(Table(n), prefix, temperature).exp().detach() for n in (writer, 1))
    return ((1 - alpha) * own + alpha * other).prod()


def token_kls(student=None, writer=0, alpha=0.0, temperature=1.0, **temperatures):
    """Reverse KLs of the current student at every prefix, as often as it is reached."""
    student = student or Table(0)
    return sum(
        reached(prefix, writer, alpha, temperature)
        * kl_at(student, Table(1), prefix, **temperatures)
        for prefix in PREFIXES
    )


def gradient_of_token_kls(**options):
    student = Table(0)
    return flat_gradient(token_kls(student, **options), student)


def close(got, expected):
    assert (got - expected).norm() <= 1e-10 * expected.norm()
    assert expected.norm() > 1e-2


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_with_discount_0_it_is_the_sum_of_the_token_kls(k):
    close(expected_gradient(corrected(), k=k), gradient_of_token_kls())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("surrogate", [ImportanceSampling(), PPOClip(), CISPO()])
def test_with_discount_1_it_is_the_gradient_of_the_sequence_kl(surrogate, k):
    student, teacher = Table(0), Table(1)
    total = 0
    for tokens in all_completions(3):
        own, other = log_probs(student, tokens).sum(), log_probs(teacher, tokens).sum()
        total = total + own.exp() * (own - other.detach())
    got = expected_gradient(corrected(gamma=1.0, surrogate=surrogate), k=k)
    close(got, flat_gradient(total, student))


@pytest.mark.parametrize("writer", [0, 2], ids=["current", "old"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2])
def test_importance_weights_make_every_token_exact_whoever_wrote_it(k, alpha, writer):
    """An old student, a mixture, or both: the KL is the current student's at each prefix."""
    got = expected_gradient(corrected(), k=k, alpha=alpha, writer=writer)
    close(got, gradient_of_token_kls(alpha=alpha, writer=writer))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_later_tokens_stay_a_score_function_estimate_of_what_has_sampled(alpha, gamma):
    student, teacher, writer = Table(0), Table(1), Table(2)
    total = token_kls(student, writer=2, alpha=alpha)
    for tokens in all_completions(3):
        own = log_probs(student, tokens)
        old, other = (log_probs(model, tokens).detach() for model in (writer, teacher))
        mixed = (1 - alpha) * old.exp() + alpha * other.exp()
        for t in range(len(tokens)):
            later = sum(gamma**n * ratio for n, ratio in enumerate((old - other)[t + 1 :], 1))
            total = total + mixed.prod() * own[t].exp() / mixed[t] * later
    got = expected_gradient(corrected(gamma=gamma), writer=2, alpha=alpha)
    close(got, flat_gradient(total, student))


def test_the_coefficient_multiplies_all_of_it():
    doubled = expected_gradient(corrected(gamma=0.5, kl_coefficient=2.0))
    close(doubled, 2 * expected_gradient(corrected(gamma=0.5)))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_declared_temperature_is_exact_too(temperature):
    got = expected_gradient(
        corrected(temperature=temperature),
        temperature=temperature,
        temperatures=(1.0, temperature),
    )
    expected = gradient_of_token_kls(
        temperature=temperature, student_temperature=temperature, teacher_temperature=temperature
    )
    close(got, expected)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"writer": 2}, {"temperature": 1.5}])
def test_gkd_corrects_what_is_sampled_at_any_temperature(options):
    close(expected_gradient(corrected_gkd(), **options), gradient_of_token_kls(**options))


def test_gkd_corrects_with_a_tempered_teacher():
    got = expected_gradient(corrected_gkd(teacher_temperature=0.5), temperatures=(1.0, 0.5))
    close(got, gradient_of_token_kls(teacher_temperature=0.5))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_in_the_process_can_tell_as_few_tokens(temperature):
    teacher = TopKTeacher(LocalTeacher.of(Table(1)), k=1, temperatures=[1.0, 2.0])
    options = {"temperature": temperature, "teacher": teacher}
    both = dict.fromkeys(("student_temperature", "teacher_temperature"), temperature)
    got = expected_gradient(corrected(temperature=temperature), **options)
    close(got, gradient_of_token_kls(temperature=temperature, **both))


def test_without_the_correction_it_is_biased():
    """The oracle can tell."""
    events = expected_gradient(lambda **k: GKD(divergence="reverse_kl", **k))
    expected = gradient_of_token_kls()
    assert (events - expected).norm() > 0.1 * expected.norm()


def test_a_sampled_token_alone_is_unbiased_from_the_same_answers():
    close(expected_gradient(OnPolicyDistillation), gradient_of_token_kls())


def test_a_teacher_that_tells_everything_leaves_nothing_to_chance():
    """Text by text, not only on average."""
    teacher = LocalTeacher.of(Table(1))
    got, fit = step(corrected(), teacher=teacher)
    whole = expected_gradient(lambda **k: GKD(divergence="reverse_kl", **k), teacher=teacher)
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-14)
    assert fit.callback_metrics["train/corrected_gradient_noise"] == 0


@pytest.mark.parametrize("make", [corrected(), corrected_gkd()], ids=["opd", "gkd"])
def test_the_loss_is_the_reverse_kl_on_average(make):
    _, fit = step(make)
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(token_kls().item(), rel=1e-6)


SLOPES = {
    "unclipped": (ImportanceSampling(), lambda ratio, advantage: ratio * advantage),
    "PPO": (
        PPOClip(0.1, 0.1),
        # Where the loss is clipped it is flat.
        lambda ratio, a: ratio * a if (ratio <= 1.1 if a > 0 else ratio >= 0.9) else 0.0,
    ),
    "CISPO": (CISPO(1.1), lambda ratio, advantage: min(ratio, 1.1) * advantage),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("surrogate", SLOPES)
@pytest.mark.parametrize("writer", [0, 2])
def test_the_noise_is_the_mean_square_of_the_chance_part(k, writer, surrogate):
    """By the sum over prefixes and tokens, with scores from autograd."""
    clipped, slope = SLOPES[surrogate]
    _, fit = step(corrected(surrogate=clipped, kl_coefficient=1.5), k=k, writer=writer)
    expected = {"sampled": 0.0, "corrected": 0.0}
    for prefix in PREFIXES:
        student = Table(0)
        own, other, old = (next_log_probs(m, prefix) for m in (student, Table(1), Table(writer)))
        named = other.topk(k).indices.tolist()
        rest = [v for v in range(len(TOKENS)) if v not in named]
        rewarded, current = (old - other).detach(), (own - other).detach()
        of_tail = own[rest].logsumexp(-1).detach() - other[rest].logsumexp(-1).detach()
        for v in range(len(TOKENS)):
            square = torch.autograd.grad(own[v], student.rows, retain_graph=True)[0].square().sum()
            weight = (reached(prefix, writer) * old[v].exp() * square).item()
            ratio = (own[v] - old[v]).exp().item()
            expected["sampled"] += weight * slope(ratio, -rewarded[v].item()) ** 2
            if v in rest:
                hidden = (current[v] - of_tail).item()
                expected["corrected"] += weight * slope(ratio, -hidden) ** 2
    for name, value in expected.items():
        logged = fit.callback_metrics[f"train/{name}_gradient_noise"].item()
        assert logged == pytest.approx(value, rel=1e-6), name
    assert (expected["corrected"] > 0) == (k == 1)  # a tail of one token is known
    if surrogate == "unclipped":  # elsewhere it depends on which tokens are clipped
        assert expected["corrected"] < expected["sampled"]


# In runs: with an output head, micro-batches and the callback that generates.


class NamingLlama(Teacher):
    """The k most likely tokens of a model, in this process."""

    answers = frozenset({"top_k_and_token"})
    vocabulary_size = 18

    def __init__(self, k=3):
        self.model, self.k = tiny_llama(1).double(), k

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_probs = logits[positions.mask].double().log_softmax(-1)
        best = log_probs.topk(self.k)
        targets = positions.targets.clamp(min=0)[:, None]
        return TopKAndToken(
            best.indices, best.values, label_log_probs=log_probs.gather(-1, targets)[:, 0]
        )


def generating(**options):
    generation = options.pop("generation", SamplingOptions(max_new_tokens=6))
    return OnPolicyGeneration(generation=generation, table_every=0, **options)


def run(make=None, *, writing=None, batch_size=4, accumulate=1, teacher=None, **options):
    make = make or corrected()
    probe = GradientProbe()
    module = make(
        student=StudentSpec.of(tiny_llama(0)), teacher=teacher or NamingLlama(), **options
    )
    callbacks = [writing or generating(), probe]
    fit = trainer(
        max_steps=1,
        max_epochs=-1,
        callbacks=callbacks,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        val_check_interval=accumulate,
    )
    fit.fit(module, datamodule=Letters(batch_size=batch_size))
    return fit, probe.gradient


@pytest.mark.parametrize("make", [corrected(gamma=0.5), corrected_gkd()], ids=["opd", "gkd"])
def test_a_chunk_at_a_time_is_the_same_as_all_logits_at_once(make):
    (fused_fit, fused), (dense_fit, dense) = (
        run(make, logits_backend=backend) for backend in (FusedLogits(), DenseLogits())
    )
    torch.testing.assert_close(fused, dense, rtol=1e-9, atol=1e-12)
    for name in ("loss", "sampled_gradient_noise", "corrected_gradient_noise"):
        name = f"train/{name}"
        assert fused_fit.callback_metrics[name] == pytest.approx(dense_fit.callback_metrics[name])


def test_what_is_logged_does_not_depend_on_micro_batches():
    whole, first = run(batch_size=4)
    parts, second = run(batch_size=2, accumulate=2)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    for name in ("sampled_gradient_noise", "corrected_gradient_noise", "loss"):
        name = f"train/{name}"
        assert whole.callback_metrics[name] == pytest.approx(
            parts.callback_metrics[name].item(), rel=1e-9
        )
    noises = [whole.callback_metrics[f"train/{n}_gradient_noise"] for n in ("corrected", "sampled")]
    assert 0 < noises[0] < noises[1]


@pytest.mark.parametrize("make", [corrected(), corrected_gkd()], ids=["opd", "gkd"])
def test_validation_is_over_the_teachers_events(make):
    fit, _ = run(make)
    # Under a name of its own: in training the estimate is of all tokens.
    assert fit.lightning_module.evaluation_terms == ("top_k_reverse_kl",)
    assert fit.callback_metrics["val/top_k_reverse_kl"] == pytest.approx(
        fit.callback_metrics["val/loss"].item(), rel=1e-6
    )
    measured = {name for name in fit.callback_metrics if name.startswith("val/")}
    assert "val/divergence" not in measured
    assert not any("noise" in name for name in measured)


class Unnamed(NamingLlama):
    answers = frozenset({"top_k"})


class WithoutLogProbs(Engine):
    def generate(self, prompts, options, *, seeds, models):
        raise AssertionError

    def unused(self) -> Completions: ...


REFUSED = {
    "tokens without the sampled one": (
        {"teacher": Unnamed()},
        "OnPolicyDistillation needs a teacher that answers full_distribution or top_k_and_token",
    ),
    "gkd, tokens without the sampled one": (
        {"make": corrected_gkd(), "teacher": Unnamed()},
        "GKD needs a teacher that answers full_distribution or top_k_and_token",
    ),
    "gkd, rows of the data": (
        {"make": corrected_gkd(), "writing": generating(lmbda=0.5)},
        "GKD learns only from what the student has sampled; set lmbda: 1, or leave model.estimator",
    ),
    "gkd, truncated sampling": (
        {
            "make": corrected_gkd(),
            "writing": generating(generation=SamplingOptions(max_new_tokens=6, top_k=3)),
        },
        "GKD weighs tokens by how likely they were to be sampled",
    ),
    "gkd, an engine without log-probabilities": (
        {"make": corrected_gkd(), "writing": generating(engine=WithoutLogProbs())},
        "GKD needs the log-probability of each sampled token",
    ),
    "gkd, a temperature that is not declared": (
        {"make": corrected_gkd(teacher_temperature=2.0)},
        "model.teacher_temperature is 2.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_corrected_is_refused_before_the_first_step(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_gkd_refuses_an_estimator_without_rollouts():
    module = corrected_gkd()(student=StudentSpec.of(tiny_llama(0)), teacher=NamingLlama())
    with pytest.raises(ValueError, match="CorrectedTopK learns from what the student generates"):
        trainer(max_steps=1, precision="64-true").fit(module, datamodule=Letters(batch_size=4))


class Tenfold(ReverseKL):
    def value(self, student_log_probs, teacher_log_probs):
        return 10 * super().value(student_log_probs, teacher_log_probs)


@pytest.mark.parametrize(
    ("divergence", "name"), [("forward_kl", "ForwardKL"), (Tenfold(), "Tenfold")]
)
def test_gkd_refuses_an_estimator_of_another_divergence(divergence, name):
    with pytest.raises(ValueError, match=f"estimates the reverse KL, and the divergence is {name}"):
        GKD(
            divergence=divergence,
            estimator=CorrectedTopK(),
            student=StudentSpec("./never"),
            teacher=LocalTeacher("./never"),
        )


def test_terms_are_those_of_the_estimator():
    both = [
        OnPolicyDistillation(
            estimator=estimator, student=StudentSpec("./never"), teacher=LocalTeacher("./never")
        )
        for estimator in (None, SampledToken(), CorrectedTopK())
    ]
    names = [module.terms for module in both]
    assert names[0] == names[1] == ("policy_gradient",)
    assert names[2] == ("policy_gradient", *CorrectedTopK.watched)
