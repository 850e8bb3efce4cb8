"""What the host knows of a device without asking, and copies that are queued."""

import pytest
import torch
from torch import Tensor

from lightning_kd import devices
from lightning_kd.batch import IGNORE_INDEX, copy_of
from lightning_kd.devices import LateCopy, clone, origin_of, pinned, to_device
from lightning_kd.scoring import ScoredPositions, find_places
from tests.support.looks import Looks
from tests.support.toys import ragged_batch

CUDA = torch.device("cuda")


@pytest.fixture
def copies(monkeypatch):
    """How tensors are copied to a device that is not there."""
    made = []

    def pin_memory(self):
        pinned = self.clone()
        made.append(("pinned", pinned.tolist()))
        return pinned

    def to(self, device, *, non_blocking=False):
        made.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    return made


def test_a_copy_to_cuda_is_queued_from_pinned_memory(copies):
    to_device(torch.ones(2), CUDA)
    assert copies == [("pinned", [1, 1]), ("cuda", True)]


def test_a_copy_to_the_cpu_is_waited_for(copies):
    to_device(torch.ones(2), torch.device("cpu"))
    assert copies == [("cpu", False)]


def test_a_whole_batch_is_pinned(copies):
    text = {"input_ids": torch.tensor([[3]])}
    batch = {"input_ids": torch.tensor([[1, 2]]), "text": text, "prompt": ["a"]}
    assert pinned(batch, torch.device("cpu")) is batch
    assert not copies
    found = pinned(batch, CUDA)
    assert copies == [("pinned", [[1, 2]]), ("pinned", [[3]])]
    assert found["prompt"] == ["a"]
    assert found["input_ids"] is not batch["input_ids"]


def looks_at(labels):
    with Looks() as looks:
        positions = ScoredPositions.from_labels(labels)
        read = positions.rows, positions.tokens_per_row
        read += (positions.pick(torch.zeros(*labels.shape, 3)),)
    assert len(read[-1]) == len(positions.targets)
    return looks.count, positions


def test_what_was_found_once_is_known_of_copies():
    batch = ragged_batch([(2, 3), (1, 2)])
    assert looks_at(batch["labels"])[0] == 1
    assert looks_at(batch["labels"])[0] == 0
    copy = copy_of(batch)
    count, positions = looks_at(copy["labels"])
    assert count == 0
    assert positions.rows.tolist() == [0, 0, 0, 1, 1]


def test_places_are_found_on_the_host_for_a_batch_and_its_second_stream():
    batch = ragged_batch([(2, 3), (1, 2)])
    batch |= {"text": ragged_batch([(0, 4)]), "extra": {"a": [1, 2]}}
    moved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
    moved["text"] = {k: v.clone() for k, v in batch["text"].items()}
    find_places(batch, moved)
    assert looks_at(moved["labels"])[0] == looks_at(moved["text"]["labels"])[0] == 0
    with Looks() as looks:
        everywhere = ScoredPositions.everywhere(moved["labels"], moved["attention_mask"])
    assert looks.count == 0
    assert torch.equal(everywhere.mask, batch["attention_mask"].bool())


@pytest.mark.parametrize("other", ["of a loader", ["rows"], None])
def test_what_is_no_batch_is_left_alone(other):
    find_places(other, other)


def test_changed_labels_are_looked_at_again():
    labels = ragged_batch([(2, 3), (1, 2)])["labels"]
    copy = clone(labels)
    before = ScoredPositions.from_labels(copy)
    copy[0] = IGNORE_INDEX
    count, after = looks_at(copy)
    assert count == 1
    assert after.targets.tolist() == copy[1, 1:3].tolist()
    assert len(before.targets) == 5
    assert before.key != after.key
    assert ScoredPositions.from_labels(labels).key == before.key


def test_equal_tensors_of_different_origin_are_not_taken_for_copies():
    first, second = torch.ones(2), torch.ones(2)
    assert origin_of(first) is not origin_of(second)
    assert origin_of(first) is origin_of(clone(clone(first)))


def test_inference_tensors_are_looked_at_each_time():
    with torch.inference_mode():
        labels = ragged_batch([(2, 3)])["labels"]
        assert looks_at(labels)[0] == looks_at(labels)[0] == 1
        assert origin_of(labels) is not origin_of(labels)


def test_a_late_copy_comes_with_the_next_one(monkeypatch):
    late = LateCopy()
    assert late.exchange(torch.tensor(1.0)) == 1
    assert late.flush() is None
    monkeypatch.setattr(devices, "_IN_STEP", frozenset())
    assert late.exchange(torch.tensor(2.0)) is None
    assert late.exchange(torch.tensor(3.0)) == 2
    assert late.flush() == 3
    assert late.flush() is None


def test_values_of_other_shape_than_the_rows_are_refused():
    scored = ScoredPositions.from_labels(ragged_batch([(2, 3)])["labels"])
    with pytest.raises(ValueError, match=r"shape \(1, 6, 2\) came for tokens \(1, 5\)"):
        scored.pick(torch.zeros(1, 6, 2))


def test_places_that_an_evaluation_has_found_can_be_trained_on():
    """As an index they are saved for the backward pass, which refuses tensors of inference mode."""
    labels = torch.tensor([[-100, 3, 4], [5, -100, 6]])
    with torch.inference_mode():
        found = ScoredPositions.from_labels(labels).places
    values = torch.ones(2, 3, requires_grad=True)
    ScoredPositions.from_labels(labels).pick(values).sum().backward()
    assert found.tolist() == [0, 1, 4]  # those that predict a label
    assert torch.equal(values.grad.flatten().nonzero()[:, 0], found)
