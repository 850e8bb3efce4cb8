"""Methods and teachers of few tokens: what is computed, logged and refused."""

import math

import numpy as np
import pytest
import torch

from lightning_kd.divergences import ForwardKL, ReverseKL, available_divergences
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    LazyHeadLogits,
    SampledTokens,
    TopK,
    TopKAndToken,
    evaluate_no_grad,
)
from lightning_kd.models import DenseLogits, StudentSpec
from lightning_kd.modules import GKD, BabyLlama, RLDistillation, SupervisedKD
from lightning_kd.rewards import exact_match
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import RoutedTeacher, Teacher, TeacherEnsemble
from tests.support.harness import BatchList, Letters, fit_one_step, trainer
from tests.support.sparse_teachers import Tells, tell
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 7)]))
N, V = 6, 18
SPARSE = ("top_k", "top_k_and_token", "sampled")


def draw(seed, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = draw(0), draw(1)
TARGETS = torch.tensor([3, -100, 17, 0, 5, 5])


def softmax(logits, temperature=1.0):
    exponents = np.exp(logits.numpy() / temperature)
    return exponents / exponents.sum(-1, keepdims=True)


def refused(module, message):
    fit = trainer(max_steps=1, max_epochs=-1)
    with pytest.raises(ValueError, match=message):
        fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 0


def validated(module):
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    assert all(math.isfinite(value) for value in shown.values())
    return shown


# Tempered events.


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_tail_at_a_temperature_tempers_every_event(temperature, k):
    answer = tell(TEACHER, TARGETS, "top_k", k, (temperature,))
    answer.check(N, V)
    p = softmax(TEACHER, temperature)
    ids = answer.token_ids.numpy()
    expected = np.take_along_axis(p, ids, -1)
    if k < V:
        np.put_along_axis(p, ids, 0.0, -1)
        expected = np.concatenate([expected, p.sum(-1, keepdims=True)], -1)
    np.testing.assert_allclose(answer.at(temperature, V).exp().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_label_is_tempered_with_the_named_tokens(temperature, k):
    answer = tell(TEACHER, TARGETS, "top_k_and_token", k, (1.0, temperature))
    answer.check(N, V)
    found = answer.label_log_probs_at(temperature, TARGETS, V).numpy()
    labels = TARGETS.clamp(min=0).numpy()[:, None]
    expected = np.log(np.take_along_axis(softmax(TEACHER, temperature), labels, -1)[:, 0])
    np.testing.assert_allclose(found, np.where(TARGETS == -100, 0.0, expected), rtol=1e-9)


def test_an_undeclared_temperature_is_refused_by_the_declared_ones():
    with pytest.raises(ValueError, match=r"is 3\.0, .* cannot be tempered .*: 1\.0, 2\.0"):
        tell(TEACHER, TARGETS, "top_k", 4, (2.0,)).at(3.0, V)


# What is learned.


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("backend", [None, DenseLogits()], ids=["fused", "dense"])
def test_a_step_from_few_tokens_at_a_declared_temperature(kind, backend):
    temperature = 1.0 if kind == "sampled" else 2.0
    student, network = tiny_llama(0).double(), tiny_llama(1).double()
    module = SupervisedKD(
        student=StudentSpec.of(student),
        teacher=Tells(network, kind, k=5, temperatures=(1.0, 2.0)),
        alpha=0.0,
        temperature=temperature,
        logits_backend=backend,
    )
    with torch.no_grad():
        scored = BATCH["labels"][:, 1:] != -100
        z, u = (
            model(BATCH["input_ids"], BATCH["attention_mask"]).logits[:, :-1][scored].double()
            for model in (student, network)
        )
    q, p = softmax(z, temperature), softmax(u, temperature)
    if kind == "sampled":
        drawn = tell(u, torch.zeros(len(u), dtype=torch.long), kind).token_ids.numpy()
        cross_entropy = -np.log(np.take_along_axis(q, drawn, -1)).mean(-1)
        expected = (cross_entropy + (p * np.log(p)).sum(-1)).mean()
    else:
        ids = np.argsort(-p, -1)[:, :5]
        q, p = (np.take_along_axis(x, ids, -1) for x in (q, p))
        q, p = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (q, p))
        expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    loss, gradient = fit_one_step(module, [BATCH])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


# What is logged.


def test_metrics_of_k_tokens_and_the_label():
    student, network = tiny_llama(0), tiny_llama(1)
    common = {"student": StudentSpec.of(student), "alpha": 0.5}
    shown = validated(SupervisedKD(teacher=Tells(network, "top_k_and_token"), **common))
    fewer = validated(SupervisedKD(teacher=Tells(network, "top_k"), **common))
    assert shown.keys() - fewer.keys() == {"val/label_log_ratio"}
    assert {name: shown[name] for name in fewer} == pytest.approx(fewer)
    with torch.no_grad():
        labels = BATCH["labels"][:, 1:]
        log_q, log_p = (
            model(BATCH["input_ids"], BATCH["attention_mask"]).logits[:, :-1].log_softmax(-1)
            for model in (student, network)
        )
        ratio = (log_q - log_p).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = ratio[labels != -100].mean().item()
    assert shown["val/label_log_ratio"] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_drawn_tokens_say_what_they_estimate():
    student, network = tiny_llama(0), tiny_llama(1)
    teacher = Tells(network, "sampled", draws=4000)
    module = SupervisedKD(student=StudentSpec.of(student), teacher=teacher, alpha=0.5)
    shown = validated(module)
    whole = Tells(network, "full_distribution")
    exact = validated(SupervisedKD(student=StudentSpec.of(student), teacher=whole, alpha=0.5))
    assert shown["val/sampled_forward_kl"] == pytest.approx(exact["val/forward_kl"], rel=0.05)
    assert shown["val/teacher_entropy"] == pytest.approx(exact["val/teacher_entropy"], rel=1e-6)
    assert not {"val/forward_kl", "val/reverse_kl", "val/top1_agreement"} & shown.keys()


def test_rl_distillation_from_k_tokens_and_the_label():
    module = RLDistillation(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=Tells(tiny_llama(1), "top_k_and_token"),
        rewards=[exact_match],
        normalization="token",
    )
    shown = validated(module)
    assert shown["val/top_k_reverse_kl"] == pytest.approx(shown["val/loss"])


# What is refused, before the first step.


class Tenfold(ForwardKL):
    """One whose own formula the estimate does not read."""

    def value(self, student_log_probs, teacher_log_probs):
        return 10 * super().value(student_log_probs, teacher_log_probs)


OTHERS = [*(name for name in available_divergences() if name != "forward_kl"), Tenfold()]


@pytest.mark.parametrize("method", [GKD, SupervisedKD])
@pytest.mark.parametrize("name", OTHERS)
def test_drawn_tokens_tell_the_forward_kl_alone(method, name):
    module = method(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=Tells(tiny_llama(1), "sampled"),
        divergence=name,
    )
    refused(module, r"model.divergence is .*, but Tells answers sampled.*Take forward_kl")


def test_drawn_tokens_hold_at_temperature_1():
    teacher = Tells(tiny_llama(1), "sampled", temperatures=(1.0, 2.0))
    module = BabyLlama(student=StudentSpec.of(tiny_llama(0)), teacher=teacher, temperature=2.0)
    refused(module, r"model.temperature is 2.0, but Tells answers sampled.* 1 alone")


def test_temperatures_that_are_not_declared_are_refused_by_name():
    teacher = Tells(tiny_llama(1), "top_k", temperatures=(1.0, 4.0))
    student = StudentSpec.of(tiny_llama(0))
    module = SupervisedKD(student=student, teacher=teacher, temperature=2.0)
    refused(
        module, r"is 2.0, but Tells answers top_k, which holds at temperature 1, 4 alone.*1 or 4"
    )


def test_an_ensemble_of_few_tokens_is_refused():
    """Their sets of tokens differ, so nothing is known of the average."""
    for kind in SPARSE:
        with pytest.raises(ValueError, match=f"0 \\(Tells\\) answers {kind}"):
            TeacherEnsemble([Tells(tiny_llama(seed), kind) for seed in (1, 2)])


def test_drawn_tokens_are_no_distribution():
    answer = tell(TEACHER, TARGETS, "sampled")
    head = LazyHeadLogits(((STUDENT, torch.eye(V).double()),))
    for term, message in (
        (DivergenceTerm(ReverseKL()), r"is ReverseKL\(\), but .* sampled.*Take forward_kl"),
        (DivergenceTerm(Tenfold()), r"is Tenfold\(\), but .* not even one that derives from it"),
        (DivergenceTerm(ForwardKL(), teacher_temperature=2.0), "drawn at temperature 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_no_grad(ChunkedPass(head, answer, [term]))


GOOD = tell(TEACHER, TARGETS, "top_k_and_token", 3, (1.0, 2.0))
DRAWN = tell(TEACHER, TARGETS, "sampled", draws=3)
TOP = (GOOD.token_ids, GOOD.log_probs)


@pytest.mark.parametrize(
    ("answer", "message"),
    {
        "tail": (TopK(*TOP, {2.0: torch.zeros(N, 1)}), r"a tail of shape \(6, 1\) at temper"),
        "few tails": (TopK(*TOP, {2.0: torch.zeros(N - 1)}), "5 positions, but 6 are scored"),
        "cold": (TopK(*TOP, {0.0: torch.zeros(N)}), "at positive temperatures"),
        "infinite": (TopK(*TOP, {2.0: torch.full((N,), -torch.inf)}), "no log-probabilities"),
        "sum": (TopK(*TOP, {1.0: torch.zeros(N)}), "of its tail at temperature 1 add up to 1"),
        "label": (TopKAndToken(*TOP, label_log_probs=torch.ones(N)), "no log-probabilities"),
        "column": (
            TopKAndToken(*TOP, label_log_probs=torch.zeros(N, 1)),
            r"label_log_probs of shape \(6, 1\)",
        ),
        "ragged": (
            SampledTokens(DRAWN.token_ids, DRAWN.weights[:, :2], DRAWN.entropies),
            r"token_ids \(6, 3\), weights \(6, 2\)",
        ),
        "unknown": (
            SampledTokens(DRAWN.token_ids + V, DRAWN.weights, DRAWN.entropies),
            "must be from 0 to 17",
        ),
        "counts": (
            SampledTokens(DRAWN.token_ids, 3 * DRAWN.weights, DRAWN.entropies),
            "add up to between 3.0000 and 3.0000",
        ),
        "negative": (
            SampledTokens(DRAWN.token_ids, -DRAWN.weights, DRAWN.entropies),
            "0 or more and add up to 1",
        ),
        "entropy": (
            SampledTokens(DRAWN.token_ids, DRAWN.weights, DRAWN.entropies * torch.nan),
            "finite and 0 or more",
        ),
    }.values(),
)
def test_answers_that_cannot_be_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        answer.check(N, V)
    GOOD.check(N, V)
    DRAWN.check(N, V)


# Of one position: tokens 3 and 4 are named, and all others have 0.05 together.
NAMED = (torch.tensor([[3, 4]]), torch.tensor([[0.9, 0.05]]).log())
TAIL = {1.0: torch.tensor([0.05]).log()}


@pytest.mark.parametrize("tails", [TAIL, {}], ids=["declared", "undeclared"])
@pytest.mark.parametrize(
    ("target", "label", "message"),
    [
        (3, 0.99, r"label_log_probs -0.0101 for token 3 at position 0, .* say -0.1054 of the same"),
        (3, np.exp(-50), "say -0.1054 of the same token"),
        (4, 0.9, "say -2.9957 of the same token"),
        (7, 0.2, r"not named it is -2.9957 at most, by the tail and the least likely named"),
        (3, 0.9, None),
        (4, 0.05, None),
        (7, 0.04, None),
        (7, 1e-30, None),
        (-100, 1.0, None),
    ],
)
def test_a_label_that_the_named_tokens_contradict_is_refused(target, label, message, tails):
    log_prob = torch.tensor([label]).log()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        answer = TopKAndToken(
            NAMED[0], NAMED[1].to(dtype), tails, label_log_probs=log_prob.to(dtype)
        )
        answer.check(1, V)
        if message is None:
            answer.check_targets(torch.tensor([target]), V)
        else:
            with pytest.raises(ValueError, match=message if dtype == torch.float32 else "label"):
                answer.check_targets(torch.tensor([target]), V)


@pytest.mark.parametrize("scale", [0.0, 1.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [18, 3000])
def test_labels_that_are_rounded_are_taken(width, dtype, scale):
    draws = torch.Generator().manual_seed(0)
    log_probs = (scale * torch.randn(width, width, generator=draws)).log_softmax(-1)
    best, targets = log_probs.topk(4), torch.arange(width)
    labels = log_probs.diagonal()
    for label_dtype in (dtype, torch.float32):
        answer = TopKAndToken(
            best.indices, best.values.to(dtype), label_log_probs=labels.to(label_dtype)
        )
        answer.check_targets(targets, width)


def test_a_contradicting_label_ends_a_run_before_the_first_step():
    class Contradicts(Tells):
        def answer(self, *rest, **options):
            answer = super().answer(*rest, **options)
            wrong = answer.label_log_probs.sub(1)
            return TopKAndToken(answer.token_ids, answer.log_probs, label_log_probs=wrong)

    teacher = Contradicts(tiny_llama(1), "top_k_and_token", k=V)
    module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    refused(module, "give both of one distribution")


# One teacher for each row.


@pytest.mark.parametrize("kind", SPARSE)
def test_each_row_has_the_few_tokens_of_its_teacher(kind):
    batch = BATCH | {"extra": {"teacher": ["a", "b", "a"]}}
    scored = ScoredPositions.from_labels(batch["labels"])
    networks = {"a": tiny_llama(1).double(), "b": tiny_llama(2).double()}
    members = {
        name: Tells(network, kind, temperatures=declared)
        for (name, network), declared in zip(
            networks.items(), [(1.0, 2.0, 3.0), (1.0, 2.0)], strict=True
        )
    }
    teacher = RoutedTeacher(members)
    assert teacher.temperatures == {1.0, 2.0}
    answer = teacher.answer(batch, scored, kind=kind, logits_backend=DenseLogits())
    answer.check(len(scored.targets), V)
    of_b = torch.tensor([False, True, False])[scored.rows]
    for name, own in (("a", ~of_b), ("b", of_b)):
        alone = members[name].answer(batch, scored, kind=kind, logits_backend=DenseLogits())
        if kind == "sampled":  # the draws depend on how many rows there are
            torch.testing.assert_close(answer.entropies[own], alone.entropies[own])
            continue
        torch.testing.assert_close(answer.log_probs[own], alone.log_probs[own])
        assert torch.equal(answer.token_ids[own], alone.token_ids[own])
        assert answer.tail_log_probs.keys() == {1.0, 2.0}
        torch.testing.assert_close(answer.tail_log_probs[2.0][own], alone.tail_log_probs[2.0][own])


def test_a_teacher_whose_tail_is_known_everywhere_is_asked_at_any_temperature():
    teacher = Tells(tiny_llama(1), "top_k", k=V)
    teacher.temperatures = None
    student = StudentSpec.of(tiny_llama(0))
    loss, _ = fit_one_step(SupervisedKD(student=student, teacher=teacher, temperature=0.3), [BATCH])
    assert math.isfinite(loss)
    assert Teacher.temperatures == {1.0}
