"""Sketches, ratios, weighted sums and counts of the audit, and the columns it can append."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_kd.callbacks.audit.evidence import (
    close,
    combination_weights,
    ratio,
    relative_difference,
    sketch,
    token_counts,
)
from lightning_kd.callbacks.audit.replay import StepReplay


def gradient(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def test_a_sketch_is_linear_and_keeps_norms_and_angles():
    a, b = gradient(0, 50_000, 4096, 3), gradient(1, 50_000, 4096, 3)
    both = sketch([2 * x - 3 * y for x, y in zip(a, b, strict=True)])
    assert torch.allclose(both, 2 * sketch(a) - 3 * sketch(b))
    for g in (a, b):
        norm = np.linalg.norm(torch.cat(g).numpy())
        assert sketch(g).norm().item() == pytest.approx(norm, rel=0.05)
    assert abs(sketch(a) @ sketch(b)) < 0.1 * sketch(a).norm() * sketch(b).norm()


def test_equal_and_opposite_parameters_do_not_cancel():
    """Small ones have different offsets in the sketch."""
    one = torch.ones(5, dtype=torch.float64)
    assert sketch([one, -one]).square().sum() == pytest.approx(10)


def test_relative_differences_are_ratios_of_norms():
    a, b = gradient(0, 7, 5), gradient(1, 7, 5)
    expected = np.linalg.norm(torch.cat(a) - torch.cat(b)) / np.linalg.norm(torch.cat(b))
    assert relative_difference(a, b) == pytest.approx(expected)
    zero = [torch.zeros(7), torch.zeros(5)]
    assert relative_difference(a, a) == relative_difference(zero, zero) == 0
    assert relative_difference(a, zero) == pytest.approx(1)


def test_ratios_and_weighted_sums_are_found_only_if_they_exist():
    a, b, c = gradient(2, 30, 30, 30)
    assert ratio(2.5 * b, b, 1e-6) == pytest.approx(2.5)
    assert ratio(a, b, 1e-2) is None
    assert ratio(a, 0 * a, 1e-2) is None
    assert ratio(0 * a, a, 1e-2) is None
    found = combination_weights(2 * a - b, torch.stack([a, b]), 1e-6)
    assert found.tolist() == pytest.approx([2, -1])
    assert combination_weights(c, torch.stack([a, b]), 1e-2) is None
    assert combination_weights(0 * c, torch.zeros(2, 30), 1e-2).tolist() == [0, 0]
    assert combination_weights(c, torch.zeros(2, 30), 1e-2) is None


def test_closeness_is_relative_to_the_larger_norm():
    a = torch.tensor([3.0, 4.0])
    assert close(a, 1.09 * a, 0.1)
    assert close(1.09 * a, a, 0.1)
    assert not close(a, 1.2 * a, 0.1)
    assert close(0 * a, 0 * a, 0.0)


def test_token_counts_are_of_labels_shifted_or_not_and_of_attention():
    samples = [
        {"labels": torch.tensor([[-100, 5, 6, -100]]), "attention_mask": torch.ones(1, 4)},
        {"labels": torch.tensor([[4, -100, 6, -100]]), "attention_mask": torch.ones(1, 3)},
    ]
    assert token_counts(samples) == [
        ("scored", [2, 1]),  # nothing predicts the first token
        ("labels", [2, 2]),
        ("attended", [4, 3]),
        ("attended", [3, 2]),
    ]
    classes = [{"labels": torch.tensor([1, 0, -100])}, {"labels": torch.tensor([-100])}]
    assert token_counts(classes) == [("labels", [2, 0])]
    assert token_counts([(torch.ones(2), torch.ones(2))]) == []


@pytest.mark.parametrize(
    ("tables", "width", "columns"),
    [([], 4, 8), ([10], 7, 3), ([10, 8], 7, 1), ([10, 5], 7, 3), ([7], 7, 0), ([99], 7, 8)],
)
def test_padding_does_not_exceed_embeddings_that_hold_the_batch(tables, width, columns):
    class Tables(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

    module = Tables()
    module.tables = nn.ModuleList(nn.Embedding(size, 2) for size in tables)
    runner = StepReplay(SimpleNamespace(precision_plugin=None), module, None, None)
    batch = {"attention_mask": torch.ones(2, width)}
    assert runner.max_padding(batch) == columns
    assert runner.max_padding({"x": torch.ones(2, width)}) == 0
    if columns > 2:
        module.tables.config = SimpleNamespace(max_position_embeddings=width + 2)
        assert runner.max_padding(batch) == 2
