import pytest

from lightning_kd.schedules import AdaptiveShare, Constant, Cosine, Linear, Steps


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
        (lambda: AdaptiveShare(start=1.5), "start is 1.5; it is a share"),
        (lambda: AdaptiveShare(increase=0.0), "the first must be above 0"),
        (lambda: AdaptiveShare(tolerance=-0.1), "the second 0 or more"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_adaptive_share_grows_as_in_the_papers_algorithm():
    """A trace of losses, followed by hand: the reference moves only where the share grows."""
    losses = [3.0, 3.09, 3.1, 2.0, 3.19, 3.2, 9.0, 9.0, 9.1]
    share = AdaptiveShare(start=0.1, increase=0.4, tolerance=0.1)
    seen = []
    for loss in losses:
        share.update(loss)
        seen.append(share(0))
    assert seen == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.5, 0.9, 1.0, 1.0, 1.0])
    again = AdaptiveShare(start=0.1, increase=0.4, tolerance=0.1)
    again.load_state_dict(share.state_dict())
    assert again.state_dict() == share.state_dict() == {"share": 1.0, "reference": 9.1}
    share.forget_run()
    assert share(0) == 0.1
