"""A loss as named terms: by name, with normalizations of their own, in the sums of a step."""

import contextlib
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import CrossEntropy, DivergenceTerm, FullDistribution, MaterializedLogits
from lightning_kd.fused.logits_chunk import TokenTerm
from lightning_kd.models import DenseLogits, FusedLogits, StudentSpec
from lightning_kd.modules import (
    SFT,
    DistillationModule,
    LossTerm,
    OnPolicyDistillation,
    SupervisedKD,
)
from lightning_kd.modules.loss import (
    EvaluatedTerm,
    MicroBatchLoss,
    Scores,
    evaluate,
)
from lightning_kd.modules.loss_sums import LossSums, ReducedLoss
from lightning_kd.normalization import BatchMean, SequenceMean, TokenMean
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, fit_one_step, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 5), (1, 3)])


class Reversed(SupervisedKD):
    """Returns its terms in another order than its class states them."""

    def loss_terms(self, batch, scores):
        return dict(reversed(super().loss_terms(batch, scores).items()))


def models():
    return {"student": StudentSpec.of(tiny_llama(0)), "teacher": LocalTeacher.of(tiny_llama(1))}


def test_logits_that_are_given_are_evaluated_whoever_is_asked():
    """As those of a model whose output head is not understood."""
    own, other = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.tensor([[0, 0, 3.0], [0, 1, 0]])
    teacher = FullDistribution((MaterializedLogits(other),))
    sides = MaterializedLogits(own), teacher, [DivergenceTerm(ReverseKL())], [torch.ones(2)]
    total, values = FusedLogits().evaluate(*sides)
    q, p = own.log_softmax(-1), other.log_softmax(-1)
    expected = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(values[0], expected)
    assert total.item() == pytest.approx(expected.sum().item())


def test_the_order_of_terms_changes_nothing():
    logs = []
    for method in (SupervisedKD, Reversed):
        fit = trainer(
            max_steps=1, limit_val_batches=1.0, callbacks=[LossNormalizationDiagnostics()]
        )
        module = method(**models(), alpha=0.3, temperature=2.0)
        fit.fit(module, datamodule=BatchList([BATCH], evaluate=[BATCH]))
        logs.append({k: v.item() for k, v in fit.callback_metrics.items()})
    assert logs[0] == logs[1]
    for name in ("train/cross_entropy", "val/divergence", "norm/divergence/weight"):
        assert name in logs[0]
    assert abs(logs[0]["train/cross_entropy"] - logs[0]["train/divergence"]) > 0.1


class Misnamed(SFT):
    terms = ("cross_entropy", "entropy")


class Unstated(SFT):
    terms = ()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Misnamed, r"loss of Misnamed has the terms \['cross_entropy'\], the class states .*"
                   r"'entropy'\]: missing \['entropy'\], unknown \[\]"),
        (Unstated, r"loss of Unstated has .*: missing \[\], unknown \['cross_entropy'\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_term_that_is_missing_or_unknown_is_refused(method, message, stage):
    module = method(student=StudentSpec.of(tiny_llama(0)))
    run = trainer(max_steps=1, limit_val_batches=1.0)
    with pytest.raises(ValueError, match=message):
        getattr(run, stage)(module, datamodule=BatchList([BATCH], evaluate=[BATCH]))


class Given(TokenTerm):
    """Values as they are given."""

    def __init__(self, values):
        self._values = values

    def values(self, block):
        return self._values[block.rows]


def given(batch, values, **term):
    scored = ScoredPositions.from_labels(batch["labels"])
    return scored, LossTerm(Given(torch.tensor(values, dtype=torch.float64)), **term)


def closed(pieces, normalization, names, **own):
    """The sums of several micro-batches, each the positions and its terms."""
    sums = LossSums(names)
    for scored, terms in pieces:
        scores = Scores(scored, MaterializedLogits(torch.zeros(len(scored.targets), 2)))
        sums.add(evaluate(DenseLogits(), scores, terms, normalization, own=own)[1])
    return sums.close(lambda tensor: tensor)


def test_each_term_is_divided_by_its_own_count():
    """Rows of 2, 1 and 3 tokens in two micro-batches; the first term per row, the second per token."""
    pieces = []
    for lengths, values in (([(1, 2), (1, 1)], [1.0, 3.0, 5.0]), ([(1, 3)], [2.0, 4.0, 9.0])):
        scored, rows = given(ragged_batch(lengths), values, coefficient=2.0)
        _, own = given(ragged_batch(lengths), values, coefficient=0.5)
        pieces.append((scored, {"rows": rows, "own": own}))
    reduced = closed(pieces, SequenceMean(), ("rows", "own"), own=TokenMean())
    by_row, by_token = (2 + 5 + 5) / 3, (1 + 3 + 5 + 2 + 4 + 9) / 6
    assert reduced.means["rows"] == pytest.approx(by_row, rel=1e-15)
    assert reduced.means["own"] == pytest.approx(by_token, rel=1e-15)
    assert reduced.means["loss"] == pytest.approx(2 * by_row + 0.5 * by_token, rel=1e-15)
    assert (reduced.divisor, reduced.tokens) == (3, 6)
    assert reduced.counts == {"rows": 3, "own": 6}


class TwoCounts(DistillationModule):
    """A mean over rows of their means, and a mean over tokens, of the same cross-entropy."""

    terms = ("rows", "tokens")

    def loss_terms(self, batch, scores):
        term = CrossEntropy(scores.positions.targets)
        return {"rows": LossTerm(term), "tokens": LossTerm(term, 0.5)}

    @property
    def term_normalizations(self):
        return {"tokens": TokenMean()}


def test_the_gradient_of_a_term_with_its_own_count_is_that_of_its_mean():
    student = tiny_llama(0)
    logits = student(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[:, :-1]
    labels = BATCH["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    lengths = (labels != -100).sum(-1)
    expected = (losses.sum(-1) / lengths).mean() + 0.5 * losses.sum() / lengths.sum()
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    module = TwoCounts(student=StudentSpec.of(tiny_llama(0)), normalization="sequence")
    loss, gradient = fit_one_step(module, [BATCH])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_second_stream_adds_its_gradient_and_its_loss():
    """Over other data: the sum of both, and not their difference."""
    weights = torch.zeros(3, requires_grad=True)

    def scores(count):
        scored = ScoredPositions.from_labels(ragged_batch([(1, count)])["labels"])
        return Scores(scored, MaterializedLogits(torch.stack([weights] * count)))

    class First(TokenTerm):
        def __init__(self, factor):
            self.factor = factor

        def values(self, block):
            return self.factor * block.student_logits[:, 0]

    terms = {
        "batch": LossTerm(First(2.0)),
        "text": LossTerm(First(3.0), scores=scores(4)),
    }
    own, ratios = {"text": TokenMean()}, {"text": 2 / 4}
    total, _, _ = evaluate(
        DenseLogits(), scores(2), terms, TokenMean(), own=own, count_ratios=ratios
    )
    total.backward()
    # Undivided: 2 tokens of 2; 4 tokens of 3 as a mean, times the count of the step.
    assert weights.grad.tolist() == [2 * 2.0 + 3.0 * 2, 0, 0]


@pytest.mark.parametrize("terms", [("a", "a"), ("loss",)])
def test_two_values_with_one_name_are_refused(terms):
    with pytest.raises(ValueError, match="give each a name of its own, and not loss"):
        LossSums(terms)


def test_where_nothing_is_scored_the_divisor_is_1():
    batch = ragged_batch([(2, 0)])
    scored, term = given(batch, [])
    reduced = closed([(scored, {"a": term, "b": term})], TokenMean(), ("a", "b"), b=BatchMean())
    assert reduced == ReducedLoss(1.0, 0, {"loss": 0.0, "a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0})


def test_a_term_over_other_data_needs_a_count_of_its_own():
    scored, term = given(BATCH, [0.0] * 8)
    own = Scores(scored, MaterializedLogits(torch.zeros(8, 2)))
    other = Scores(ScoredPositions.from_labels(BATCH["labels"]), own.student)
    terms = {"a": LossTerm(term.per_token, scores=other)}
    with pytest.raises(ValueError, match=r"the term a is .* give it a normalization of its own"):
        evaluate(DenseLogits(), own, terms, TokenMean())


@pytest.mark.parametrize("kind", [Scores, LossTerm, EvaluatedTerm, MicroBatchLoss, ReducedLoss])
def test_what_callbacks_read_cannot_be_changed(kind):
    thing = object.__new__(kind)
    with pytest.raises(FrozenInstanceError):
        setattr(thing, fields(kind)[0].name, None)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_no_value_is_the_mean_of_two_with_one_name(stage):
    """The loss of a policy gradient's evaluation and the metric are both called reverse_kl."""
    module = OnPolicyDistillation(**models(), temperature=2.0, normalization="batch")
    run = trainer(limit_val_batches=1.0, limit_test_batches=1.0)
    (result,) = getattr(run, stage)(
        module, datamodule=BatchList([], evaluate=[BATCH]), verbose=False
    )
    inputs = {k: BATCH[k] for k in ("input_ids", "attention_mask")}
    z, u = (tiny_llama(seed)(**inputs).logits[:, :-1].double() for seed in (0, 1))
    scored = BATCH["labels"][:, 1:] != -100

    def kl(temperature):
        q, p = ((x / temperature).log_softmax(-1)[scored] for x in (z, u))
        return (q.exp() * (q - p)).sum(-1)

    short = {"validate": "val"}.get(stage, stage)
    assert result[f"{short}/reverse_kl"] == pytest.approx(kl(1).mean().item(), rel=1e-5)
    assert result[f"{short}/loss"] == pytest.approx(kl(2).sum().item() / 2, rel=1e-5)


# Values of a term in a chunk that are not one number for each position.


class PerChunk(TokenTerm):
    """Cross-entropy, spoilt by a function."""

    def __init__(self, change) -> None:
        self.change = change

    def values(self, chunk):
        return self.change(-chunk.student()[:, 5])


class OwnTerm(SupervisedKD):
    def __init__(self, change, **options) -> None:
        super().__init__(**options)
        self.change = change

    def loss_terms(self, batch, scores):
        return super().loss_terms(batch, scores) | {
            "cross_entropy": LossTerm(PerChunk(self.change))
        }


@pytest.mark.parametrize("backend", [DenseLogits(), FusedLogits()], ids=["dense", "fused"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.mean, r"PerChunk.values has returned shape \(\)"),
        (lambda x: x[:1], r"PerChunk.values has returned shape \(1,\)"),
        (lambda x: x[:, None], r"PerChunk.values has returned shape \(\d+, 1\)"),
        (torch.Tensor.long, r"PerChunk.values has .* type torch.int64"),
    ],
    ids=["one number", "one position", "a column", "integers"],
)
def test_a_token_term_has_one_number_for_each_position(change, message, backend):
    module = OwnTerm(change, logits_backend=backend, **models())
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=1).fit(module, datamodule=BatchList([ragged_batch([(2, 3), (1, 5)])]))


def test_a_token_term_without_a_gradient_is_refused():
    module = OwnTerm(torch.Tensor.detach, **models())
    with pytest.raises(ValueError, match="the values of PerChunk have no gradient"):
        trainer(max_steps=1).fit(module, datamodule=BatchList([ragged_batch([(2, 3), (1, 5)])]))


class TeacherConfidence(TokenTerm):
    """How sure the teacher is, in (0, 1]."""

    needs_teacher = True

    def values(self, chunk):
        return chunk.teacher().exp().amax(-1)


class WeightedByTheTeacher(SupervisedKD):
    """Cross-entropy, times the teacher's confidence."""

    without_gradient = contextlib.nullcontext

    def loss_terms(self, batch, scores):
        with self.without_gradient():
            (sure,) = self.logits_backend.per_token(
                scores.student, scores.teacher, [TeacherConfidence()]
            )
        labels = [CrossEntropy(scores.positions.targets)]
        (nats,) = self.logits_backend.per_token(scores.student, None, labels)
        return super().loss_terms(batch, scores) | {"cross_entropy": LossTerm(sure * nats)}


def test_values_of_the_teacher_alone_are_asked_for_without_a_gradient():
    batches = BatchList([ragged_batch([(2, 3), (1, 5)])])
    module = WeightedByTheTeacher(alpha=0.5, **models())
    said = r"TeacherConfidence have no gradient.*per_token for them under torch.no_grad\(\)"
    with pytest.raises(ValueError, match=said):
        trainer(max_steps=1).fit(module, datamodule=batches)
    module = WeightedByTheTeacher(alpha=0.5, **models())
    module.without_gradient = torch.no_grad
    trainer(max_steps=1).fit(module, datamodule=batches)
    assert module.student.lm_head.weight.grad.norm() > 0


class Counts(TokenMean):
    """Counts something else."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def count(self, tokens_per_row):
        return super().count(tokens_per_row) * self.factor


class DividedOnItsOwn(SupervisedKD):
    @property
    def term_normalizations(self):
        return {"divergence": Counts(0.0)}


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_count_of_nothing_where_tokens_are_scored_is_refused(factor):
    module = SupervisedKD(normalization=Counts(factor), **models())
    with pytest.raises(ValueError, match="normalization of the loss has the count"):
        trainer(max_steps=1).fit(module, datamodule=BatchList([ragged_batch([(2, 3), (1, 5)])]))


def test_a_count_of_nothing_of_a_single_term_is_refused():
    module = DividedOnItsOwn(**models())
    with pytest.raises(
        ValueError, match="normalization of the terms cross_entropy, divergence has"
    ):
        trainer(max_steps=1).fit(module, datamodule=BatchList([ragged_batch([(2, 3), (1, 5)])]))
