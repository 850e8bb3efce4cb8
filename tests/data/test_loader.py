import weakref
from itertools import islice

import pytest
import torch

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX
from lightning_kd.data import (
    Collator,
    Epochs,
    EvaluationLoader,
    Example,
    PairedLoader,
    RolloutPlan,
    TrainingLoader,
)


class Numbers:
    """Row k holds the token k, and in later passes another one."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def example(self, row, pass_):
        return Example([row, pass_])


def training(rows=10, batch_size=3, seed=0, **settings):
    return TrainingLoader(Numbers(rows), Collator(0), batch_size=batch_size, seed=seed, **settings)


def endless(loader):
    """The batches of one epoch after the other."""
    while True:
        yield from loader
        loader.set_epoch(loader.epoch + 1)


def head(loader, count):
    """Batches up to a position of the run."""
    return list(islice(endless(loader), count - loader.position))


def stream(loader, count=8):
    return [batch["input_ids"].tolist() for batch in head(loader, count)]


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
        stream(training(batch_size=batch_size, rank=r, world_size=world_size), 4)
        for r in range(world_size)
    ]
    steps = [[row for rank in ranks for row in rank[step]] for step in range(4)]
    assert steps == stream(training(batch_size=6), 4)


def test_the_rows_of_a_window_do_not_depend_on_accumulation():
    whole = stream(training(batch_size=6), 4)
    halves = stream(training(batch_size=3), 8)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.processes)])
@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 7, 8])
def test_resuming_anywhere_gives_the_rest(consumed, num_workers):
    whole = stream(training())
    first = training(num_workers=num_workers)
    iterator = endless(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(consumed)]
    second = training(num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second) == whole


def test_a_run_can_be_resumed_on_other_ranks_and_made_longer():
    first = training(batch_size=6)
    head(first, 2)
    halves = [training(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for loader in halves:
        loader.load_state_dict(first.state_dict())
    rest = [a + b for a, b in zip(*(stream(half, 4) for half in halves), strict=True)]
    assert rest == stream(training(batch_size=6), 4)[2:]


def test_other_data_another_seed_or_half_a_micro_batch_are_refused():
    state = training().state_dict() | {"samples": 6}
    with pytest.raises(ValueError, match="written with rows 10, this run has 11"):
        training(rows=11).load_state_dict(state)
    with pytest.raises(ValueError, match="written with seed 0, this run has 1"):
        training(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with 3 samples in an optimizer step .* this run has 4"):
        training(batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="sample 6, which batch_size 4 on 1 processes"):
        training(batch_size=4).load_state_dict(state | {"window": 0})


PLAN = RolloutPlan(micro_batches=2, passes=3)


def test_windows_come_again_before_the_next():
    fresh = stream(training(), 4)
    repeated = stream(training(plan=PLAN), 12)
    assert repeated == fresh[:2] * 3 + fresh[2:] * 3
    loader, seen = training(plan=PLAN), []
    for batch in islice(endless(loader), 12):
        window, place = loader.window_of(batch)
        tokens = [each["input_ids"].tolist() for each in window]
        assert tokens == fresh[2 * window.number :][:2]
        seen.append((window.number, place, loader.ends_window))
    once = [(0, False), (1, False)] * 2 + [(0, False), (1, True)]
    assert seen == [(window, *rest) for window in range(2) for rest in once]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_of_one_sample_is_known_by_its_window(rank):
    loader = training(batch_size=1, rank=rank, world_size=2, plan=PLAN)
    found = [loader.window_of(batch) for batch in islice(endless(loader), 12)]
    places = [(window.number, place) for window, place in found]
    assert places == [(0, 0), (0, 1)] * 3 + [(1, 0), (1, 1)] * 3


class Counting(Collator):
    """Notes the samples of each micro-batch that it makes, and whether they are still there."""

    def __init__(self):
        super().__init__(0)
        self.samples, self.made = [], []

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.samples.append(batch["sample"].tolist())
        self.made.append(weakref.ref(batch["input_ids"]))
        return batch


def counted(**settings):
    return TrainingLoader(Numbers(10), Counting(), batch_size=3, seed=0, plan=PLAN, **settings)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.processes)])
@pytest.mark.parametrize("consumed", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("asks", [True, False])
def test_a_window_is_collated_once(consumed, num_workers, asks):
    """Whoever asks for it, in all of its passes, and again only in a run that resumes inside it."""
    whole = stream(training(plan=PLAN), 12)
    first, second = (counted(num_workers=num_workers) for _ in range(2))

    def read(loader, count):
        seen = []
        for batch in islice(endless(loader), count):
            if asks:
                window, place = loader.window_of(batch)
                assert torch.equal(window[place]["input_ids"], batch["input_ids"])
                assert len(list(window)) == 2
            seen.append(batch["input_ids"].tolist())
        return seen

    begun = read(first, consumed)
    second.load_state_dict(first.state_dict())
    assert begun + read(second, 12 - consumed) == whole
    micro_batches = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(4)]
    windows = -(-consumed // 6)
    assert second.collate.samples == micro_batches[2 * (consumed // 6) :]
    if asks:
        assert first.collate.samples == micro_batches[: 2 * windows]
    else:
        assert first.collate.samples == micro_batches[: len(first.collate.samples)]


def test_one_window_at_a_time_is_kept():
    loader = counted()
    for number, batch in enumerate(islice(endless(loader), 12)):
        loader.window_of(batch)
        kept = [made() is not None for made in loader.collate.made]
        assert sum(kept) <= 2 + (number == 6), number  # the batch of before is still named here


def test_what_is_written_into_a_batch_is_in_no_other_pass():
    loader, seen = training(plan=PLAN), []
    for batch in islice(endless(loader), 6):
        window, place = loader.window_of(batch)
        assert window[place].keys() == batch.keys()
        seen.append(batch["labels"].tolist())
        batch.update(labels=batch["labels"] * 0, advantages=torch.zeros(3, 2))
        batch.pop("sample")
    assert seen == seen[:2] * 3


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.processes)])
@pytest.mark.parametrize(
    "plan", [RolloutPlan(), RolloutPlan(micro_batches=2), RolloutPlan(micro_batches=2, passes=3)]
)
@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_the_next_micro_batch_is_known_and_does_not_count_as_consumed(consumed, plan, num_workers):
    def from_there(look):
        loader = training(rows=20, plan=plan, num_workers=num_workers)
        loader.load_state_dict(
            loader.state_dict() | {"samples": consumed * loader.samples_per_micro_batch}
        )
        seen, told = [], []
        for batch in loader:
            seen.append(batch["input_ids"].tolist())
            if look:
                position = loader.position
                following = loader.following()
                assert loader.position == position
                told.append(None if following is None else following["input_ids"].tolist())
        return seen, told

    seen, told = from_there(look=True)
    assert told == [*seen[1:], None]
    assert seen == from_there(look=False)[0]


def test_a_batch_of_another_window_is_refused():
    loader = training(plan=PLAN)
    with pytest.raises(ValueError, match="of window 0 and the loader is at none"):
        loader.window_of({"sample": torch.tensor([0])})
    batch = head(loader, 1)[0]
    head(loader, 7)
    with pytest.raises(ValueError, match="of window 0 and the loader is at window 1"):
        loader.window_of(batch)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3), (1, 3), (3, 1), (2, 1)])
def test_no_cut_changes_the_samples_of_a_repeated_window(world_size, batch_size):
    """Windows of 12 samples in 2 passes, whoever shares them."""
    cut = 12 // (world_size * batch_size)
    plan = RolloutPlan(micro_batches=cut, passes=2)
    ranks = [
        [
            (batch["sample"].tolist(), batch["row"].tolist())
            for batch in head(
                training(batch_size=batch_size, rank=rank, world_size=world_size, plan=plan),
                4 * cut,
            )
        ]
        for rank in range(world_size)
    ]
    pairs = [pair for rank in ranks for batch in rank[:cut] for pair in zip(*batch, strict=True)]
    samples, numbers = zip(*sorted(pairs), strict=True)
    assert samples == tuple(range(12))
    assert list(numbers) == rows(stream(training(batch_size=12), 1))


def test_a_group_is_several_samples_of_one_row():
    plan = RolloutPlan(group_size=3)
    batches = head(training(batch_size=6, plan=plan), 2)
    single = rows(stream(training(batch_size=4), 1))
    assert [row for b in batches for row in b["row"].tolist()] == [
        r for r in single for _ in range(3)
    ]
    assert [s for b in batches for s in b["sample"].tolist()] == list(range(12))


@pytest.mark.parametrize("consumed", range(25))
def test_resuming_inside_a_window_gives_the_rest(consumed):
    whole = stream(training(plan=PLAN), 24)
    first = training(plan=PLAN)
    iterator = endless(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(consumed)]
    second = training(plan=PLAN)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second, 24) == whole


def test_other_rollouts_are_refused():
    state = training(plan=PLAN).state_dict()
    with pytest.raises(ValueError, match="written with passes 3, this run has 1"):
        training().load_state_dict(state)
    with pytest.raises(ValueError, match=r"6 samples in an optimizer step or window .* has 12"):
        training(plan=RolloutPlan(micro_batches=4, passes=3)).load_state_dict(state)
    with pytest.raises(ValueError, match="passes is 0; it must be 1 or more"):
        RolloutPlan(passes=0)


def windows_until_complete(rows, window, epochs):
    """The last window of each pass, one row after the other."""
    ends, taken = [], 0
    for pass_ in range(epochs):
        complete = (pass_ + 1) * rows
        while taken < complete or (ends and taken // window <= ends[-1]):
            taken += window
        ends.append(taken // window)
    return ends


@pytest.mark.parametrize(("rows", "window"), [(10, 4), (12, 4), (13, 5), (7, 7), (3, 8), (1, 2)])
def test_an_epoch_ends_with_the_window_in_which_its_pass_is_complete(rows, window):
    epochs = Epochs(samples=rows, window=window)
    assert [epochs.start(e + 1) for e in range(12)] == windows_until_complete(rows, window, 12)
    lengths = [epochs.start(e + 1) - epochs.start(e) for e in range(12)]
    assert max(lengths) == lengths[0] <= min(lengths) + 1
    assert min(lengths) >= 1
    assert [epochs.of(w) for w in range(epochs.start(12))] == [
        epoch for epoch, length in enumerate(lengths) for _ in range(length)
    ]


CUTS = [(1, 6, 2), (2, 3, 2), (3, 2, 2), (1, 3, 4), (1, 12, 1)]


@pytest.mark.parametrize("settings", [{}, {"passes": 3}, {"group_size": 2}])
@pytest.mark.parametrize(("world_size", "batch_size", "micro_batches"), CUTS)
def test_where_an_epoch_ends_does_not_depend_on_the_cut(
    world_size, batch_size, micro_batches, settings
):
    """Ten rows, and windows of 12 samples."""
    plan = RolloutPlan(micro_batches, **settings)
    loader = training(batch_size=batch_size, world_size=world_size, plan=plan)
    reference = training(batch_size=12, plan=RolloutPlan(1, **settings))
    for epoch in range(6):
        assert loader.start_of(epoch) == reference.start_of(epoch) * micro_batches
        assert loader.length_of(epoch) % plan.window == 0


def test_the_next_epoch_goes_on_behind_the_last():
    loader = training(batch_size=4)
    lengths, seen = [], []
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = [batch["input_ids"].tolist() for batch in loader]
        lengths.append(len(batches))
        assert len(loader) == len(batches)
        seen += batches
    assert lengths == [3, 2, 3]
    assert seen == stream(training(batch_size=4), 8)


def test_an_epoch_that_was_broken_off_is_left_behind():
    loader = training(batch_size=5)
    next(iter(loader))
    loader.set_epoch(1)
    rest = [batch["input_ids"].tolist() for batch in loader]
    assert rest == stream(training(batch_size=5), 4)[2:]


@pytest.mark.parametrize("consumed", range(9))
def test_text_beside_a_stream_keeps_its_place(consumed):
    """Also where epochs of the text would end elsewhere."""

    def paired():
        return PairedLoader(training(batch_size=4), training(rows=7, batch_size=4, seed=1))

    def pairs(loader, count):
        return [
            (b["input_ids"].tolist(), b["text"]["input_ids"].tolist()) for b in head(loader, count)
        ]

    first, second = paired(), paired()
    first.set_epoch(0)
    begun = pairs(first, consumed)
    second.load_state_dict(first.state_dict())
    assert begun + pairs(second, 8) == pairs(paired(), 8)
    assert [text for _, text in pairs(paired(), 8)] == stream(
        training(rows=7, batch_size=4, seed=1), 8
    )


def test_the_state_of_another_loader_is_refused():
    with pytest.raises(
        ValueError, match=r"state with \['position'\], this one needs \['files', 'group_size'"
    ):
        training().load_state_dict({"position": 3})


def test_iterating_draws_nothing_from_the_global_generator():
    evaluation = EvaluationLoader(Numbers(5), Collator(0), batch_size=2)
    before = torch.get_rng_state()
    head(training(), 8)
    # By itself a process is alone, and has all rows.
    assert [row for batch in evaluation for row in batch["row"].tolist()] == [*range(5)]
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
        return TrainingLoader(Numbers(12), Collator(0), batch_size=2, seed=0, files=files)

    state = reading(a="1", b="2").state_dict()
    reading(a="1", b="2").load_state_dict(state)
    reading(elsewhere="1", b="2").load_state_dict(state)
    with pytest.raises(
        ValueError, match="data has changed since the checkpoint was written: b\\. "
    ):
        reading(a="1", b="3").load_state_dict(state)
    with pytest.raises(ValueError, match="written: c\\. "):
        reading(a="1", b="2", c="3").load_state_dict(state)
