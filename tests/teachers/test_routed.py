"""Teachers of any kind, each for its own rows."""

import json
import math

import numpy as np
import pytest
import scipy.special
import torch

from lightning_kd.data import PromptCompletionData
from lightning_kd.divergences import ForwardKL
from lightning_kd.fused import (
    ChunkedPass,
    DivergenceTerm,
    FullDistribution,
    MaterializedLogits,
    TokenLogProbs,
    TopK,
    evaluate_no_grad,
)
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import GKD, OnPolicyDistillation, SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher, RoutedTeacher, Teacher, TeacherEnsemble
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

V = 18
WHO = ["a", "b", "a", "b"]
BATCH = with_prompts(ragged_batch([(2, 4), (1, 2), (3, 3), (2, 1)])) | {"extra": {"teacher": WHO}}
SCORED = ScoredPositions.from_labels(BATCH["labels"])
OF_B = torch.tensor([name == "b" for name in WHO])[SCORED.rows]


class Model(Teacher):
    """A network that answers in one way, and checks that it sees its own rows alone."""

    def __init__(self, network, own, kind, k=4, vocabulary=V):
        self.network, self.own, self.k = network, own, k
        self.answers = frozenset({kind})
        self.vocabulary_size = vocabulary

    answers = frozenset()
    vocabulary_size = V

    @torch.no_grad()
    def answer(self, batch, positions, *, kind, logits_backend):
        assert batch["extra"]["teacher"] == [self.own] * len(batch["row"])
        assert len(positions.targets) == int(positions.mask.sum())
        expected = batch["labels"][:, 1:][positions.mask[:, :-1]]
        assert torch.equal(positions.targets, expected)
        logits = self.network(batch["input_ids"], batch["attention_mask"]).logits[positions.mask]
        log_probs = logits.log_softmax(-1)
        if kind == "full_distribution":
            return FullDistribution((MaterializedLogits(logits),))
        if kind == "top_k":
            best = log_probs.topk(self.k)
            return TopK(best.indices, best.values)
        return TokenLogProbs(log_probs.gather(-1, positions.targets[:, None])[:, 0])


def networks():
    return [tiny_llama(seed).double() for seed in (0, 1, 2)]


@torch.no_grad()
def distributions():
    """Of the student and of each row's teacher, ``(N, V)``."""
    q, a, b = (
        model(BATCH["input_ids"], BATCH["attention_mask"]).logits[SCORED.mask].softmax(-1)
        for model in networks()
    )
    return q, torch.where(OF_B[:, None], b, a)


def routed(kind, **options):
    _, a, b = networks()
    return RoutedTeacher({"a": Model(a, "a", kind), "b": Model(b, "b", kind, **options)})


@pytest.mark.parametrize("backend", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("kind", ["full_distribution", "top_k"])
def test_each_row_has_its_teachers_distribution(kind, backend):
    student, _, _ = networks()
    module = GKD(
        student=StudentSpec.of(student),
        teacher=routed(kind),
        divergence="forward_kl",
        logits_backend=backend,
    )
    loss, gradient = fit_one_step(module, [BATCH])
    q, p = distributions()
    if kind == "top_k":
        known = p.topk(4).indices
        events = [x.gather(-1, known) for x in (q, p)]
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in events)
    expected = scipy.special.rel_entr(p.numpy(), q.numpy()).sum(-1).mean()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()


def test_each_row_has_its_teachers_probability_of_a_token():
    answer = routed("token_log_probs").answer(
        BATCH, SCORED, kind="token_log_probs", logits_backend=DenseLogits()
    )
    _, p = distributions()
    expected = p.gather(-1, SCORED.targets[:, None])[:, 0].log()
    torch.testing.assert_close(answer.values, expected, rtol=1e-10, atol=1e-10)
    student = StudentSpec.of(tiny_llama(0))
    module = OnPolicyDistillation(student=student, teacher=routed("token_log_probs"))
    (shown,) = trainer(limit_val_batches=1.0).validate(
        module, datamodule=BatchList([], [BATCH]), verbose=False
    )
    assert all(math.isfinite(value) for value in shown.values())


@pytest.mark.parametrize("rows", [100, 2], ids=["in one chunk", "two positions at a time"])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_an_ensemble_may_teach_some_of_the_rows(combine, rows):
    """At a temperature, at which averages of logits and of probabilities differ."""
    _, a, b = networks()
    pair = TeacherEnsemble([LocalTeacher.of(a), LocalTeacher.of(b)], combine=combine)
    teacher = RoutedTeacher({"a": pair, "b": LocalTeacher.of(tiny_llama(2).double())})
    teacher.prepare(letter_tokenizer(), torch.device("cpu"), "equal")
    answer = teacher.answer(BATCH, SCORED, kind="full_distribution", logits_backend=DenseLogits())
    with torch.no_grad():
        z, u, v = (
            model(BATCH["input_ids"], BATCH["attention_mask"]).logits[SCORED.mask].numpy()
            for model in networks()
        )
    term = DivergenceTerm(ForwardKL(), teacher_temperature=2.0)
    logits = MaterializedLogits(torch.from_numpy(z))
    # Of a row, the logits of student and teacher's models.
    chunk_bytes = rows * V * 8 * 3
    values = evaluate_no_grad(ChunkedPass(logits, answer, [term], chunk_bytes))[0]
    softmax = scipy.special.softmax
    if combine == "logits":
        of_pair = softmax((u + v) / 4, axis=-1)
    else:
        of_pair = (softmax(u / 2, axis=-1) + softmax(v / 2, axis=-1)) / 2
    p = np.where(OF_B[:, None].numpy(), softmax(v / 2, axis=-1), of_pair)
    expected = scipy.special.rel_entr(p, softmax(z, axis=-1)).sum(-1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-10)


class Sharper(LocalTeacher):
    """The square of a model's distribution, normalized."""

    def answer(self, batch, positions, *, kind="full_distribution", logits_backend):
        answer = super().answer(batch, positions, kind=kind, logits_backend=logits_backend)
        return FullDistribution(
            answer.logits, lambda logits, t: (2 * logits[0] / t).log_softmax(-1)
        )


@pytest.mark.parametrize("rows", [100, 2], ids=["in one chunk", "two positions at a time"])
@pytest.mark.parametrize("outer", ["routed", "logits", "probabilities"])
def test_a_routed_teacher_in_another_teacher_counts_with_its_own_distribution(outer, rows):
    _, a, b = networks()
    inner = RoutedTeacher(
        {
            "a": TeacherEnsemble([LocalTeacher.of(a), LocalTeacher.of(b)], combine="probabilities"),
            "b": Sharper.of(tiny_llama(2).double()),
        }
    )
    third = LocalTeacher.of(tiny_llama(3).double())
    if outer == "routed":
        teacher = RoutedTeacher({"a": inner, "b": third})
    else:
        teacher = TeacherEnsemble([inner, third], combine=outer)
    teacher.prepare(letter_tokenizer(), torch.device("cpu"), "equal")
    answer = teacher.answer(BATCH, SCORED, kind="full_distribution", logits_backend=DenseLogits())
    with torch.no_grad():
        z, u, v, w = (
            model(BATCH["input_ids"], BATCH["attention_mask"]).logits[SCORED.mask].numpy()
            for model in (*networks(), tiny_llama(3).double())
        )
    term = DivergenceTerm(ForwardKL(), teacher_temperature=2.0)
    logits = MaterializedLogits(torch.from_numpy(z))
    values = evaluate_no_grad(ChunkedPass(logits, answer, [term], rows * V * 8 * 4))[0]
    softmax = scipy.special.softmax
    of_a = (softmax(u / 2, axis=-1) + softmax(v / 2, axis=-1)) / 2
    p = np.where(OF_B[:, None].numpy(), softmax(v, axis=-1), of_a)
    other = softmax(w / 2, axis=-1)
    if outer == "routed":
        p = np.where(OF_B[:, None].numpy(), other, of_a)
    elif outer == "probabilities":
        p = (p + other) / 2
    else:
        p = np.sqrt(p * other)
        p /= p.sum(-1, keepdims=True)
    expected = scipy.special.rel_entr(p, softmax(z, axis=-1)).sum(-1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["top_k", "token_log_probs"])
def test_the_type_of_one_members_answer_does_not_round_anothers(kind):
    class Rounded(Model):
        def answer(self, *rest, **options):
            answer = super().answer(*rest, **options)
            return TopK(answer.token_ids, answer.log_probs.bfloat16())

    class RoundedToken(Model):
        def answer(self, *rest, **options):
            return TokenLogProbs(super().answer(*rest, **options).values.bfloat16())

    _, a, b = networks()
    rounded = Rounded if kind == "top_k" else RoundedToken
    teacher = RoutedTeacher({"a": rounded(a, "a", kind), "b": Model(b, "b", kind)})
    both = teacher.answer(BATCH, SCORED, kind=kind, logits_backend=DenseLogits())
    own = b(BATCH["input_ids"], BATCH["attention_mask"]).logits[SCORED.mask].log_softmax(-1)
    if kind == "top_k":
        expected, found = own.topk(4).values, both.log_probs
    else:
        expected, found = own.gather(-1, SCORED.targets[:, None])[:, 0], both.values
    torch.testing.assert_close(found[OF_B], expected[OF_B], rtol=1e-12, atol=1e-12)


def test_wrong_members_are_refused():
    _, a, b = networks()
    with pytest.raises(ValueError, match="RoutedTeacher needs at least one member; got none"):
        RoutedTeacher({})
    for members in ([LocalTeacher.of(a)], {1: LocalTeacher.of(a)}):
        with pytest.raises(ValueError, match="give a mapping from each value of the column"):
            RoutedTeacher(members)
    with pytest.raises(ValueError, match=r"in common; 'a' \(Model\) answers top_k, 'b' \(Local"):
        RoutedTeacher({"a": Model(a, "a", "top_k"), "b": LocalTeacher.of(b)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "answer k = 4, 6 tokens; rows of one batch need one k"),
        (
            {"vocabulary": 30},
            r"unequal vocabularies \('a' 18, 'b' 30\), and the answer top_k needs",
        ),
    ],
)
def test_answers_that_do_not_fit_each_other_are_refused(options, message):
    teacher = routed("top_k", **options)
    with pytest.raises(ValueError, match=message):
        teacher.answer(BATCH, SCORED, kind="top_k", logits_backend=DenseLogits())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_that_names_no_member_is_refused_before_the_first_step(tmp_path, split):
    def written(name, teachers):
        path = tmp_path / name
        rows = [{"prompt": "ab", "completion": "cd", "teacher": who} for who in teachers]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def fit(wrong, columns):
        files = {
            s: written(f"{s}.jsonl", ["a", "b", wrong if s == split else "a"])
            for s in ("train", "validation")
        }
        data = PromptCompletionData(
            tokenizer=letter_tokenizer(), batch_size=1, extra_columns=columns, **files
        )
        _, a, b = networks()
        teacher = RoutedTeacher({"a": LocalTeacher.of(a), "b": LocalTeacher.of(b)})
        lightning = trainer(max_steps=3)
        lightning.fit(
            SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher), datamodule=data
        )
        return lightning.global_step

    assert fit("b", ["teacher"]) == 3
    with pytest.raises(
        ValueError, match=rf"{split}.jsonl:3: column 'teacher' asks for the teacher 'c'; there"
    ):
        fit("c", ["teacher"])
    with pytest.raises(ValueError, match=r"no column 'teacher'; name it in data\.extra_columns"):
        fit("b", [])
