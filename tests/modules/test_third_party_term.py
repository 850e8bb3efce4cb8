"""A method of a third party with a term over pairs of neighbouring tokens, given as ready values."""

import pytest
import torch

from lightning_kd.callbacks import LossNormalizationDiagnostics, OnPolicyGeneration
from lightning_kd.fused import CrossEntropy, Entropy
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import DenseLogits, FusedLogits
from lightning_kd.modules import LossTerm
from lightning_kd.normalization import TokenMean
from tests.modules.pair_term_grid import CUTS, WEIGHT, SmoothKD, begins_pair, module, run
from tests.support.harness import BatchList, GradientProbe, fit_one_step, trainer
from tests.support.scripts import written_by
from tests.support.toys import ragged_batch, tiny_llama

# Five, one, no and three labels: of the four rows, two have pairs.
BATCH = ragged_batch([(2, 5), (1, 1), (3, 0), (2, 3)])


def by_hand(batch):
    """The loss row by row and token by token, from whole logits in float64, and its gradient."""
    student, teacher = tiny_llama(0).double(), tiny_llama(1).double()
    divergences, roughness, changed = [], [], []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        row = ids[mask.bool()][None]
        q, p = (model(row).logits[0].log_softmax(-1) for model in (student, teacher))
        before, changes = None, []
        for place in range(1, row.shape[1]):
            if labels[place] == -100:
                before = None
                continue
            divergences.append((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
            likelihood = q[place - 1, labels[place]]
            if before is not None:
                changes.append((likelihood - before) ** 2)
            before = likelihood
        if changes:
            roughness.append(sum(changes) / len(changes))
            changed += changes
    terms = sum(divergences) / len(divergences), sum(roughness) / len(roughness)
    loss = terms[0] + WEIGHT * terms[1]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters())])
    by_pair = sum(changed) / len(changed)
    assert (by_pair - terms[1]).abs() > 1e-3, "pairs and rows would be divided alike"
    return [loss.item(), *(term.item() for term in terms)], gradient


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("backend", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(backend):
    expected, gradient = by_hand(BATCH)
    probe = GradientProbe()
    fit = trainer(max_steps=1, precision="64-true", callbacks=[probe], limit_val_batches=1.0)
    fit.fit(module(logits_backend=backend), datamodule=BatchList([BATCH], evaluate=[BATCH]))
    assert (probe.gradient - gradient).norm() < 1e-10 * gradient.norm()
    logged = fit.callback_metrics
    names = ("train/loss", "train/divergence", "train/roughness")
    assert [logged[name].item() for name in names] == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("float64_norms")
def test_an_evaluation_divides_each_term_by_its_own_count_however_it_is_cut():
    expected, _ = by_hand(BATCH)
    pieces = [{key: value[rows] for key, value in BATCH.items()} for rows in ([0, 1], [2], [3])]
    for batches in ([BATCH], pieces):
        run = trainer(limit_test_batches=1.0, precision="64-true")
        (result,) = run.test(module(), datamodule=BatchList([], evaluate=batches), verbose=False)
        names = ("test/loss", "test/divergence", "test/roughness")
        assert [result[name] for name in names] == pytest.approx(expected, rel=1e-6)


@pytest.mark.processes
@pytest.mark.usefixtures("float64_norms")
def test_no_cut_changes_loss_or_gradient(tmp_path):
    """Over micro-batches and two processes, on a loader that tells the micro-batches of a step."""
    two_processes = written_by("modules/pair_term_grid.py", tmp_path / "grid.pt")
    losses, gradients = run(module(), CUTS[0])
    assert len(losses) == len(gradients) == 2
    for cut in CUTS[1:]:
        others, found = run(module(), cut) if cut[0] == 1 else two_processes[cut]
        assert others == pytest.approx(losses, rel=1e-12)
        for a, b in zip(found, gradients, strict=True):
            assert (a - b).norm() < 1e-10 * b.norm()


def writing():
    """Two steps of rollouts at once."""
    sampling = SamplingOptions(max_new_tokens=5)
    return OnPolicyGeneration(generation=sampling, steps_per_window=2, table_every=0)


@pytest.mark.slow
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_audit_finds_the_same_gradient_in_its_cuts(on_policy):
    """Of rows from the loader, and of rollouts, whose lengths no loader knows."""
    audit = LossNormalizationDiagnostics(audit=1, tolerance=1e-9, on_fault="raise")
    callbacks = [writing(), audit] if on_policy else [audit]
    losses, gradients = run(module(), (1, 4, 2), *callbacks)
    assert audit.audit.report.differences.keys() >= {"as_trained", "reversed", "per_sample"}
    whole, expected = run(module(), (1, 1, 8), *([writing()] if on_policy else []))
    assert losses == pytest.approx(whole, rel=1e-12)
    assert (gradients[1] - expected[1]).norm() < 1e-10 * expected[1].norm()


class Changed(SmoothKD):
    """One of its terms is made otherwise."""

    def change(self, term, batch, scores):
        raise NotImplementedError

    def loss_terms(self, batch, scores):
        terms = dict(super().loss_terms(batch, scores))
        changed = self.change(terms.pop("roughness"), batch, scores)
        return terms if changed is None else terms | {"roughness": changed}


class Missing(Changed):
    def change(self, term, batch, scores):
        return None


class Unknown(SmoothKD):
    terms = ("divergence",)
    term_normalizations = {}  # noqa: RUF012


class TooMany(Changed):
    def change(self, term, batch, scores):
        return LossTerm(torch.cat([term.per_token, term.per_token[:1]]), positions=term.positions)


class OnePerRow(Changed):
    def change(self, term, batch, scores):
        return LossTerm(term.per_token[:, None], positions=term.positions)


class Detached(Changed):
    def change(self, term, batch, scores):
        return LossTerm(term.per_token.detach(), positions=term.positions)


class OwnPositionsAlone(SmoothKD):
    """Leaves the pairs to the module's normalization."""

    term_normalizations = {}  # noqa: RUF012


class ChunkedPairs(Changed):
    def change(self, term, batch, scores):
        return LossTerm(Entropy(), positions=term.positions)


class OtherName(SmoothKD):
    term_normalizations = {"smoothness": TokenMean()}  # noqa: RUF012


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Missing, r"loss of Missing .*: missing \['roughness'\], unknown \[\]"),
        (Unknown, r"loss of Unknown .*: missing \[\], unknown \['roughness'\]"),
        (TooMany, r"term roughness has ready values of shape \(7,\) for 6 positions"),
        (OnePerRow, r"term roughness has ready values of shape \(6, 1\) for 6 positions"),
        (Detached, r"term roughness has ready values without a gradient"),
        (OwnPositionsAlone, r"term roughness is over other positions .* \(term_normalizations"),
        (ChunkedPairs, r"term roughness is a token term, .* leave positions out"),
        (OtherName, r"of OtherName names \['smoothness'\]; its terms are divergence, roughness"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(method, message):
    built = module(method)
    with pytest.raises(ValueError, match=message):
        fit_one_step(built, [BATCH], precision="64-true")
    assert built.global_step == 0


class Miscounted(SmoothKD):
    """Counts all labels where it has pairs."""

    def term_positions(self, name, batch):
        return self.positions(batch)

    def loss_terms(self, batch, scores):
        pairs = super().term_positions("roughness", batch)
        terms = super().loss_terms(batch, scores)
        return terms | {"roughness": LossTerm(terms["roughness"].per_token, positions=pairs)}


class Promised(SmoothKD):
    """States a ratio that these rows do not have."""

    def constant_count_ratios(self):
        return {"roughness": 2.0}


@pytest.mark.parametrize("method", [Miscounted, Promised])
def test_a_step_that_was_counted_wrongly_ahead_is_an_error(method):
    with pytest.raises(
        ValueError, match=f"its term roughness by 2, but {method.__name__} had expec"
    ):
        fit_one_step(module(method), [BATCH], precision="64-true")


class LoggedOnly(Changed):
    def change(self, term, batch, scores):
        return LossTerm(term.per_token.detach(), 0.0, positions=term.positions)


@pytest.mark.usefixtures("float64_norms")
def test_a_term_without_weight_needs_no_gradient_and_is_logged():
    expected, _ = by_hand(BATCH)
    fit = trainer(max_steps=1, precision="64-true")
    fit.fit(module(LoggedOnly), datamodule=BatchList([BATCH]))
    logged = fit.callback_metrics
    assert logged["train/roughness"].item() == pytest.approx(expected[2], rel=1e-6)
    assert logged["train/loss"].item() == pytest.approx(expected[1], rel=1e-6)


class ReadyOnly(SmoothKD):
    """The mean negative log-likelihood of the labels, given as ready values and nothing else."""

    terms = ("ready",)
    term_normalizations = {}  # noqa: RUF012

    def loss_terms(self, batch, scores):
        labels = [CrossEntropy(scores.positions.targets)]
        (nll,) = self.logits_backend.per_token(scores.student, None, labels)
        return {"ready": LossTerm(nll)}


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("backend", [FusedLogits(), DenseLogits()], ids=["fused", "dense"])
@pytest.mark.parametrize("log_every_n_steps", [1, 5])
def test_a_loss_of_ready_values_alone(backend, log_every_n_steps):
    """With metrics at the same positions, and without."""
    student = tiny_llama(0).double()
    logits = student(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten()
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters())])
    built = module(ReadyOnly, logits_backend=backend)
    _, gradient = fit_one_step(
        built, [BATCH], precision="64-true", log_every_n_steps=log_every_n_steps
    )
    assert (gradient - expected).norm() < 1e-10 * expected.norm()


def test_a_pair_begins_where_the_next_label_is_scored_too():
    scored = module().positions(BATCH)
    assert begins_pair(scored).tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False]
