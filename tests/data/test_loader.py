import pytest
import torch

from lightning_kd.data import Collator, EvaluationLoader, Example, RolloutPlan, TrainingLoader
from lightning_kd.types import FILLER_ROW, IGNORE_INDEX


class Numbers:
    """Row k holds the token k, and in later passes another one."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def example(self, row, pass_):
        return Example([row, pass_])


def training(rows=10, batch_size=3, micro_batches=8, seed=0, **settings):
    return TrainingLoader(
        Numbers(rows),
        Collator(0),
        batch_size=batch_size,
        micro_batches=micro_batches,
        seed=seed,
        **settings,
    )


def stream(loader):
    return [batch["input_ids"].tolist() for batch in loader]


def rows(batches):
    return [row for batch in batches for row, _ in batch]


def test_every_pass_visits_every_row_once_in_an_order_of_its_own():
    seen = rows(stream(training()))
    assert len(seen) == 24
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert seen[:10] != list(range(10))
    passes = [p for batch in stream(training()) for _, p in batch]
    assert passes == [0] * 10 + [1] * 10 + [2] * 4


def test_the_order_comes_from_the_seed_alone():
    assert stream(training()) == stream(training())
    assert stream(training()) != stream(training(seed=1))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_cut(world_size, batch_size):
    ranks = [
        stream(training(batch_size=batch_size, micro_batches=4, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    steps = [[row for rank in ranks for row in rank[step]] for step in range(4)]
    assert steps == stream(training(batch_size=6, micro_batches=4))


def test_the_rows_of_a_window_do_not_depend_on_accumulation():
    whole = stream(training(batch_size=6, micro_batches=4))
    halves = stream(training(batch_size=3, micro_batches=8))
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 7, 8])
def test_resuming_anywhere_gives_the_rest(consumed, num_workers):
    whole = stream(training())
    first = training(num_workers=num_workers)
    iterator = iter(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(consumed)]
    second = training(num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second) == whole


def test_a_run_can_be_resumed_on_other_ranks_and_made_longer():
    first = training(batch_size=6, micro_batches=2)
    list(first)
    halves = [training(batch_size=3, micro_batches=4, rank=rank, world_size=2) for rank in range(2)]
    for loader in halves:
        loader.load_state_dict(first.state_dict())
    rest = [a + b for a, b in zip(*map(stream, halves), strict=True)]
    assert rest == stream(training(batch_size=6, micro_batches=4))[2:]


def test_other_data_another_seed_or_half_a_micro_batch_are_refused():
    state = training().state_dict() | {"samples": 6}
    with pytest.raises(ValueError, match="written with rows 10, this run has 11"):
        training(rows=11).load_state_dict(state)
    with pytest.raises(ValueError, match="written with seed 0, this run has 1"):
        training(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="sample 6, which batch_size 4 on 1 processes"):
        training(batch_size=4).load_state_dict(state)


PLAN = RolloutPlan(micro_batches=2, passes=3)


def test_windows_come_again_before_the_next():
    fresh = stream(training(micro_batches=4))
    repeated = stream(training(micro_batches=12, plan=PLAN))
    assert repeated == fresh[:2] * 3 + fresh[2:] * 3
    loader = training(micro_batches=12, plan=PLAN)
    windows = [[batch["input_ids"].tolist() for batch in loader.window(k)] for k in range(2)]
    assert windows == [fresh[:2], fresh[2:]]
    places, ends = [], []
    for batch in loader:
        places.append(loader.window_of(batch))
        ends.append(loader.ends_window)
    assert places == [(0, 0), (0, 1)] * 3 + [(1, 0), (1, 1)] * 3
    assert ends == ([False] * 5 + [True]) * 2


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3), (1, 3), (3, 1), (2, 1)])
def test_no_cut_changes_the_samples_of_a_repeated_window(world_size, batch_size):
    """Windows of 12 samples in 2 passes, whoever shares them."""
    cut = 12 // (world_size * batch_size)
    plan = RolloutPlan(micro_batches=cut, passes=2)
    ranks = [
        [
            (batch["sample"].tolist(), batch["row"].tolist())
            for batch in training(
                batch_size=batch_size,
                micro_batches=4 * cut,
                rank=rank,
                world_size=world_size,
                plan=plan,
            )
        ]
        for rank in range(world_size)
    ]
    pairs = [pair for rank in ranks for batch in rank[:cut] for pair in zip(*batch, strict=True)]
    samples, numbers = zip(*sorted(pairs), strict=True)
    assert samples == tuple(range(12))
    assert list(numbers) == rows(stream(training(batch_size=12, micro_batches=1)))


def test_a_group_is_several_samples_of_one_row():
    plan = RolloutPlan(group_size=3)
    batches = list(training(batch_size=6, micro_batches=2, plan=plan))
    single = rows(stream(training(batch_size=4, micro_batches=1)))
    assert [row for b in batches for row in b["row"].tolist()] == [
        r for r in single for _ in range(3)
    ]
    assert [s for b in batches for s in b["sample"].tolist()] == list(range(12))


@pytest.mark.parametrize("consumed", range(13))
def test_resuming_inside_a_window_gives_the_rest(consumed):
    whole = stream(training(micro_batches=12, plan=PLAN))
    first = training(micro_batches=12, plan=PLAN)
    iterator = iter(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(consumed)]
    second = training(micro_batches=12, plan=PLAN)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second) == whole


def test_other_rollouts_are_refused():
    state = training(plan=PLAN).state_dict()
    with pytest.raises(ValueError, match="written with passes 3, this run has 1"):
        training().load_state_dict(state)
    with pytest.raises(ValueError, match="written with window 6, this run has 12"):
        training(plan=RolloutPlan(micro_batches=4, passes=3)).load_state_dict(state)
    with pytest.raises(ValueError, match="passes is 0; it must be 1 or more"):
        RolloutPlan(passes=0)


def test_the_state_of_another_loader_is_refused():
    with pytest.raises(
        ValueError, match=r"state with \['position'\], this one needs \['files', 'group_size'"
    ):
        training().load_state_dict({"position": 3})


def test_iterating_draws_nothing_from_the_global_generator():
    evaluation = EvaluationLoader(Numbers(5), Collator(0), batch_size=2)
    before = torch.get_rng_state()
    list(training())
    list(evaluation)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_row_once_and_ranks_stay_in_step(world_size, count):
    ranks = [
        list(
            EvaluationLoader(
                Numbers(count), Collator(0), batch_size=2, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    numbers = [n for batches in ranks for b in batches for n in b["row"].tolist()]
    assert sorted(n for n in numbers if n != FILLER_ROW) == list(range(count))
    for batch in (b for batches in ranks for b in batches):
        filler = batch["row"] == FILLER_ROW
        assert (batch["labels"][filler] == IGNORE_INDEX).all()
        assert (batch["labels"][~filler] != IGNORE_INDEX).all()


def test_a_file_that_has_changed_is_named():
    def reading(**files):
        return TrainingLoader(
            Numbers(12), Collator(0), batch_size=2, micro_batches=9, seed=0, files=files
        )

    state = reading(a="1", b="2").state_dict()
    reading(a="1", b="2").load_state_dict(state)
    reading(elsewhere="1", b="2").load_state_dict(state)
    with pytest.raises(
        ValueError, match="data has changed since the checkpoint was written: b\\. "
    ):
        reading(a="1", b="3").load_state_dict(state)
    with pytest.raises(ValueError, match="written: c\\. "):
        reading(a="1", b="2", c="3").load_state_dict(state)
