import pytest
import torch

from lightning_kd.divergences import (
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    available_divergences,
    make_divergence,
    register_divergence,
)
from tests.support.toys import logit_gradient


class ChiSquare(Divergence):
    def value(self, student_log_probs, teacher_log_probs):
        return (2 * teacher_log_probs - student_log_probs).exp().sum(-1) - 1


class Scaled(Divergence):
    """Keeps its parameter under another name."""

    def __init__(self, factor=2.0):
        self._factor = factor

    def value(self, student_log_probs, teacher_log_probs):
        return self._factor * ForwardKL().value(student_log_probs, teacher_log_probs)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution on the path that registers what its module holds."""

    def write(name, module, source, attribute):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / "someones_divergences-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: someones-divergences\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[lightning_kd.divergences]\n{name} = {module}:{attribute}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)

    return write


THIRD_PARTY = """
from lightning_kd.divergences import Divergence

class Overlap(Divergence):
    def __init__(self, scale=1.0):
        self.scale = scale

    def value(self, student_log_probs, teacher_log_probs):
        return self.scale * (1 - (student_log_probs + teacher_log_probs).exp().sum(-1))
"""


def test_a_decorated_class_is_made_by_name(log_probs):
    register_divergence("chi_square_of_mine")(ChiSquare)
    assert "chi_square_of_mine" in available_divergences()
    divergence = make_divergence("chi_square_of_mine")
    assert isinstance(divergence, ChiSquare)
    assert divergence.name == "chi_square_of_mine"


def test_registrations_do_not_outlive_a_test():
    assert "chi_square_of_mine" not in available_divergences()


def test_gradient_without_a_closed_form_is_the_automatic_one(log_probs):
    student, teacher = log_probs
    ratio = (2 * teacher - student).exp()
    expected = student.exp() * ratio.sum(-1, keepdim=True) - ratio
    with torch.no_grad():
        gradient = logit_gradient(ChiSquare(), student, teacher)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert not gradient.requires_grad


def test_automatic_gradient_leaves_the_callers_graph_alone(log_probs):
    student, teacher = (side.clone().requires_grad_() for side in log_probs)
    logit_gradient(ChiSquare(), student, teacher)
    assert student.grad is None
    assert teacher.grad is None


def test_automatic_gradient_is_float32_for_half_precision(log_probs):
    student, teacher = (side.bfloat16() for side in log_probs)
    gradient = logit_gradient(ChiSquare(), student, teacher)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, logit_gradient(ChiSquare(), student.float(), teacher.float()))


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match=r"'forward_kl' is taken by .*forward_kl\.ForwardKL"):
        register_divergence("forward_kl")(ChiSquare)
    assert isinstance(make_divergence("forward_kl"), ForwardKL)


def test_registering_a_class_again_is_allowed():
    """A notebook cell that is run twice defines its class twice."""
    register_divergence("chi_square_of_mine")(ChiSquare)
    again = type("ChiSquare", (ChiSquare,), {"__module__": ChiSquare.__module__})
    register_divergence("chi_square_of_mine")(again)
    assert type(make_divergence("chi_square_of_mine")) is again


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="unknown divergence 'forward_lk'") as error:
        make_divergence("forward_lk")
    for name in available_divergences():
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["RevKL", "revers_kl", "ReversKL", "REVERSE_KL"])
def test_an_unknown_name_comes_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"'{name}'; did you mean reverse_kl. choose one of"):
        make_divergence(name)


def test_a_class_is_made_by_its_own_name():
    assert type(make_divergence("ReverseKL")) is ReverseKL
    assert make_divergence("GeneralizedJSD", beta=0.1).beta == 0.1
    register_divergence("reverse_kl_of_mine")(type("ReverseKL", (ChiSquare,), {}))
    with pytest.raises(ValueError, match="unknown divergence 'ReverseKL'"):
        make_divergence("ReverseKL")  # which of the two?


def test_an_instance_is_handed_back():
    divergence = GeneralizedJSD(0.1)
    assert make_divergence(divergence) is divergence
    with pytest.raises(ValueError, match=r"GeneralizedJSD\(beta=0.1.*\['beta'\] came too late"):
        make_divergence(divergence, beta=0.2)


def test_an_entry_point_is_listed_and_made(install, log_probs):
    install("overlap", "overlap_of_someone", THIRD_PARTY, "Overlap")
    assert "overlap" in available_divergences()
    divergence = make_divergence("overlap", scale=2.0)
    assert divergence.name == "overlap"
    student, teacher = log_probs
    expected = 2 - 2 * (student.exp() * teacher.exp()).sum(-1)
    torch.testing.assert_close(divergence(student, teacher), expected, rtol=1e-12, atol=0)


def test_an_entry_point_of_another_type_is_refused(install):
    install("ratio", "ratio_of_someone", "def ratio(): ...", "ratio")
    with pytest.raises(ValueError, match="'ratio' = ratio_of_someone:ratio is not a subclass"):
        make_divergence("ratio")


def test_an_entry_point_cannot_replace_what_is_registered(install):
    install("forward_kl", "impostor_of_someone", THIRD_PARTY, "Overlap")
    assert available_divergences().count("forward_kl") == 1
    assert isinstance(make_divergence("forward_kl"), ForwardKL)


def test_repr_is_what_one_would_write():
    assert repr(GeneralizedJSD(0.3, normalized=True)) == "GeneralizedJSD(beta=0.3, normalized=True)"
    assert repr(ForwardKL()) == "ForwardKL()"
    assert repr(Scaled(3.0)) == "Scaled()"


def test_a_divergence_needs_a_value():
    with pytest.raises(TypeError, match="abstract"):
        Divergence()


class Spoilt(ChiSquare):
    """Its value, changed by a function."""

    def __init__(self, change):
        self.change = change

    def value(self, student_log_probs, teacher_log_probs):
        return self.change(super().value(student_log_probs, teacher_log_probs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.sum, r"Spoilt.value has returned \(\) for log-probabilities of shape"),
        (lambda x: x[..., None], r"Spoilt.value has returned \(.*1\) for"),
        (lambda x: None, "Spoilt.value has returned NoneType for"),
    ],
    ids=["one number", "a column", "nothing"],
)
def test_a_value_that_is_not_one_number_for_each_position_is_refused(log_probs, change, message):
    divergence = Spoilt(change)
    for evaluate in (divergence, divergence.value_and_logit_gradient):
        with pytest.raises(ValueError, match=message):
            evaluate(*log_probs)


def test_a_value_without_a_gradient_is_refused(log_probs):
    with pytest.raises(ValueError, match=r"Spoilt\.value does not depend on student_log_probs"):
        Spoilt(lambda x: x.detach()).value_and_logit_gradient(*log_probs)
