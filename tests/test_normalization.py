import numpy as np
import pytest
import torch

from lightning_kd.fused import CrossEntropy, LazyHeadLogits, MaterializedLogits, TokenTerm
from lightning_kd.models import DenseLogits, FusedLogits
from lightning_kd.modules.loss import LossTerm, Scores, evaluate
from lightning_kd.modules.loss_sums import LossSums
from lightning_kd.normalization import (
    BatchMean,
    ConstantLength,
    SequenceMean,
    TokenMean,
    divisor,
    make_normalization,
)
from lightning_kd.scoring import ScoredPositions
from tests.support.toys import ragged_batch

LENGTHS = [(2, 5), (1, 1), (3, 0), (2, 9)]
# Written from the definitions, with NumPy means over Python lists.
REFERENCES = {
    "token": lambda rows: np.mean([v for row in rows for v in row]),
    "sequence": lambda rows: np.mean([np.mean(row) for row in rows if row]),
    "batch": lambda rows: np.mean([np.sum(row) for row in rows if row]),
    "constant": lambda rows: np.sum([np.sum(row) for row in rows]) / (12 * sum(map(bool, rows))),
}
NORMALIZATIONS = {
    "token": TokenMean(),
    "sequence": SequenceMean(),
    "batch": BatchMean(),
    "constant": ConstantLength(max_length=12),
}


class Given(TokenTerm):
    """Values that are known beforehand."""

    def __init__(self, values):
        self._values = values

    def values(self, block):
        return self._values[block.rows]


def evaluated(terms, scored, normalization):
    student = MaterializedLogits(torch.zeros(len(scored.targets), 2))
    scores = Scores(scored, student)
    return evaluate(DenseLogits(), scores, terms, normalization)[1]


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("cut", [[4], [1, 1, 1, 1], [2, 2], [3, 1]])
def test_the_loss_is_the_definition_however_the_batch_is_cut(name, cut):
    generator = torch.Generator().manual_seed(1)
    values = [torch.rand(c, generator=generator, dtype=torch.float64) for _, c in LENGTHS]
    sums = LossSums(("term",))
    start = 0
    for rows in cut:
        piece = slice(start, start + rows)
        scored = ScoredPositions.from_labels(ragged_batch(LENGTHS[piece])["labels"])
        term = LossTerm(Given(torch.cat(values[piece])))
        sums.add(evaluated({"term": term}, scored, NORMALIZATIONS[name]))
        start += rows
    reduced = sums.close(lambda tensor: tensor)
    expected = REFERENCES[name]([v.tolist() for v in values])
    assert reduced.means["loss"] == pytest.approx(expected, rel=1e-14)
    assert reduced.tokens == 15


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_nothing_scored_gives_zero_and_a_finite_gradient(name):
    scored = ScoredPositions.from_labels(ragged_batch([(3, 0), (2, 0)])["labels"])
    states, weight = (torch.randn(n, 5, requires_grad=True) for n in (6, 7))
    student = LazyHeadLogits(((states[scored.mask.flatten()], weight),))
    terms = {"term": LossTerm(CrossEntropy(scored.targets))}
    total, loss, _ = evaluate(FusedLogits(), Scores(scored, student), terms, NORMALIZATIONS[name])
    total.backward()
    assert total.item() == 0
    assert torch.equal(states.grad, torch.zeros_like(states))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    sums = LossSums(("term",))
    sums.add(loss)
    assert sums.close(lambda tensor: tensor).means == {"loss": 0, "term": 0}


def test_coefficients_weigh_terms_in_the_loss_but_not_in_their_own_logs():
    scored = ScoredPositions.from_labels(ragged_batch([(1, 2)])["labels"])
    terms = {
        "a": LossTerm(Given(torch.tensor([1.0, 3.0])), 0.25),
        "b": LossTerm(Given(torch.ones(2)), 2.0),
    }
    sums = LossSums(("a", "b"))
    sums.add(evaluated(terms, scored, TokenMean()))
    assert sums.close(lambda tensor: tensor).means == {"loss": 2.5, "a": 2.0, "b": 1.0}


def test_a_count_below_one_divides_too():
    """One's own normalization may count in other units than tokens."""
    assert divisor(torch.tensor([0.25, 0.0])).tolist() == [0.25, 1.0]


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="choose one of token, sequence, batch"):
        make_normalization("tokens")
    with pytest.raises(ValueError, match="max_length"):
        make_normalization("constant")
    with pytest.raises(ValueError, match="1 or more"):
        ConstantLength(max_length=0)
