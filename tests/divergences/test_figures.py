"""What the pictures of docs/divergences.md are drawn from, against NumPy, SciPy and moments."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import entropy

from lightning_kd import available_divergences
from tests.benchmarks import divergence_figures as figures
from tests.support.divergence_references import REFERENCES

ROOT = Path(__file__).resolve().parents[2]
PLACES = np.linspace(-6, 6, 961)
MEANS = np.linspace(-4.7, 4.9, 9)
UNBOUNDED = {"forward_kl", "reverse_kl", "jeffreys", "adaptive_kl", "negative_log_acceptance"}
every_divergence = pytest.mark.parametrize("name", available_divergences())


def normal(mean, deviation):
    density = np.exp(-((PLACES - mean) ** 2) / (2 * deviation**2))
    return density / density.sum()


def two_modes():
    density = sum(
        weight / deviation * np.exp(-((PLACES - mean) ** 2) / (2 * deviation**2))
        for weight, mean, deviation in ((0.6, -2.0, 0.7), (0.4, 2.2, 0.9))
    )
    return density / density.sum()


def reference(name, mean, deviation=1.0):
    return float(REFERENCES[name](two_modes(), normal(mean, deviation)))


def slope_at_fixed_weight(mean, step):
    """Of the adaptive KL, whose weight is a constant to the gradient."""
    teacher, here = two_modes(), normal(mean, 1.0)
    ranking = np.argsort(-teacher, kind="stable")
    head = ranking[np.cumsum(teacher[ranking]) <= 0.5]
    gaps = np.abs(teacher - here)
    weight = gaps[head].sum() / gaps.sum()

    def value(at):
        student = normal(at, 1.0)
        return weight * entropy(teacher, student) + (1 - weight) * entropy(student, teacher)

    return (value(mean + step) - value(mean - step)) / (2 * step)


@every_divergence
def test_the_curve_is_the_formula_and_its_slope(name):
    found = figures.curve(name, torch.from_numpy(MEANS))
    np.testing.assert_allclose(found.values, [reference(name, mean) for mean in MEANS], rtol=1e-10)
    step = 1e-5
    slopes = [
        slope_at_fixed_weight(mean, step)
        if name == "adaptive_kl"
        else (reference(name, mean + step) - reference(name, mean - step)) / (2 * step)
        for mean in MEANS
    ]
    np.testing.assert_allclose(found.gradients, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@every_divergence
def test_no_gaussian_is_better_than_the_one_that_is_drawn(name):
    found = figures.fit(name)
    assert found.value == pytest.approx(reference(name, found.mean, found.deviation), rel=1e-10)
    starts = [(-2.0, 0.7), (2.2, 0.9), (0.0, 2.0)]
    least = min(
        minimize(lambda at: reference(name, at[0], abs(at[1])), start, method="Nelder-Mead").fun
        for start in starts
    )
    assert found.value == pytest.approx(least, rel=1e-4)


def test_the_forward_kl_has_the_moments_of_the_teacher_and_the_reverse_kl_one_mode():
    teacher, found = two_modes(), figures.fit("forward_kl")
    student = normal(found.mean, found.deviation)
    for power in (1, 2):
        assert student @ PLACES**power == pytest.approx(teacher @ PLACES**power, abs=1e-3)
    page = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text()
    mean = teacher @ PLACES
    moments = f"({mean:.2f} and {(teacher @ (PLACES - mean) ** 2) ** 0.5:.2f} of all that lies"
    assert moments in page
    assert f"parameters of {found.mean:.2f} and {found.deviation:.2f})" in " ".join(page.split())
    found = figures.fit("reverse_kl")
    assert f"({found.mean:.2f} and {found.deviation:.2f})" in page
    assert found.mean == pytest.approx(-2.0, abs=0.05)
    assert found.deviation == pytest.approx(0.7, abs=0.05)


@every_divergence
def test_what_the_page_says_of_the_curves(name):
    found = figures.curve(name, figures.MEANS)
    values, pulls = found.values, found.gradients.abs()
    least = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
    assert int(least.sum()) == (1 if name in {"forward_kl", "jeffreys", "adaptive_kl"} else 2)
    far = float(pulls[0] / pulls.max())
    if name in UNBOUNDED:
        assert far > 0.85
    elif name != "alpha_beta":
        assert far < 0.6


@pytest.mark.slow
def test_the_pictures_are_drawn_at_a_small_size_and_are_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MEANS", torch.linspace(-5, 5, 7, dtype=torch.float64))
    monkeypatch.setattr(figures, "NARROWINGS", 1)
    figures.main([str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"divergences_curves.png", "divergences_fits.png"}
    page = (ROOT / "docs" / "divergences.md").read_text()
    for name in drawn:
        (alternative,) = re.findall(rf"!\[([^\]]+)\]\({name}\)", page)
        assert len(alternative) > 40
        assert (ROOT / "docs" / name).stat().st_size < 150_000
