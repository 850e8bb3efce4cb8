import pytest

from lightning_kd.schedules import Constant, Cosine, Linear, Steps


def test_values_on_the_way():
    assert [Constant(0.3)(step) for step in (0, 100)] == [0.3, 0.3]
    assert [Linear(0.2, 1.0, steps=4)(step) for step in (0, 1, 4, 9)] == pytest.approx(
        [0.2, 0.4, 1.0, 1.0]
    )
    assert [Cosine(0.0, 1.0, steps=2)(step) for step in (0, 1, 2, 3)] == pytest.approx(
        [0, 0.5, 1, 1]
    )
    assert [Steps([0, 1], boundaries=[3])(step) for step in (0, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(1.5), "value is 1.5; it is a share"),
        (lambda: Linear(-0.1, 1, steps=3), "start is -0.1"),
        (lambda: Linear(0, 2, steps=3), "end is 2"),
        (lambda: Cosine(0, 1, steps=0), "steps is 0; it must be 1 or more"),
        (lambda: Steps([0, 1.5], boundaries=[5]), "value is 1.5; it is a share"),
        (lambda: Steps([0, 1], boundaries=[]), "one value more than boundaries"),
        (lambda: Steps([0, 1, 0], boundaries=[5, 5]), "must rise"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
