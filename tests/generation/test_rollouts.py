import pytest
import torch

from lightning_kd.batch import FILLER_ROW
from lightning_kd.generation import completion_texts, rollout_batch
from lightning_kd.generation.completions import Completions
from lightning_kd.scoring import ScoredPositions
from tests.support.toys import letter_tokenizer

# Prompts [5, 6], [7]; the first completion ends, the second does not.
BATCH = {
    "prompt_ids": torch.tensor([[5, 6], [0, 7]]),
    "prompt_mask": torch.tensor([[1, 1], [0, 1]]),
    "prompt": ["de", "f"],
    "completion": ["", ""],
    "row": torch.tensor([3, 9]),
    "sample": torch.tensor([12, 13]),
    "labels": torch.tensor([[1, 2, 3, 4, 5, 6]] * 2),
}
WRITTEN = Completions(
    ids=torch.tensor([[8, 1, 0], [9, 10, 11]]),
    mask=torch.tensor([[True, True, False], [True, True, True]]),
    log_probs=torch.tensor([[-0.1, -0.2, 0.0], [-0.3, -0.4, -0.5]]),
    sampling_log_probs=torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]),
    ended=torch.tensor([True, False]),
)


def test_prompt_and_completion_stand_together_and_only_the_completion_is_scored():
    batch = rollout_batch(BATCH, WRITTEN, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 8, 1], [7, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 1], [-100, 9, 10, 11]]
    positions = ScoredPositions.from_labels(batch["labels"])
    assert positions.of_tokens(batch["log_probs"]).tolist() == pytest.approx(
        [-0.1, -0.2, -0.3, -0.4, -0.5]
    )
    assert positions.of_tokens(batch["sampling_log_probs"]).tolist() == [-1, -2, -3, -4, -5]
    assert completion_texts(batch, letter_tokenizer()) == ["g", "h i j"]
    assert batch["group"].tolist() == [12, 13]
    assert BATCH["labels"].shape == (2, 6)
    assert "group" not in BATCH


@pytest.mark.parametrize(("size", "groups"), [(2, [6, 6]), (13, [0, 1])])
def test_consecutive_samples_share_a_group(size, groups):
    batch = rollout_batch(BATCH, WRITTEN, pad_id=0, group_size=size)
    assert batch["group"].tolist() == groups


def test_what_was_cut_off_is_masked():
    batch = rollout_batch(BATCH, WRITTEN, pad_id=0, truncation="mask")
    assert batch["labels"].tolist() == [[-100, -100, 8, 1], [-100] * 4]
    assert batch["row"].tolist() == [3, 9]
    assert batch["log_probs"][1].abs().sum() == 0
    assert completion_texts(batch, letter_tokenizer()) == ["g", "h i j"]


def test_what_was_cut_off_is_dropped():
    batch = rollout_batch(BATCH, WRITTEN, pad_id=0, truncation="drop")
    assert batch["labels"].tolist() == [[-100, -100, 8, 1], [-100] * 4]
    assert batch["row"].tolist() == [3, FILLER_ROW]


def test_an_eos_that_is_the_padding_is_scored_once():
    written = Completions(
        ids=torch.tensor([[8, 1, 1], [1, 1, 1]]),
        mask=torch.tensor([[True, True, False], [True, False, False]]),
        log_probs=torch.zeros(2, 3),
        sampling_log_probs=torch.zeros(2, 3),
        ended=torch.tensor([True, True]),
    )
    batch = rollout_batch(BATCH, written, pad_id=1)
    assert batch["labels"].tolist() == [[-100, -100, 8, 1], [-100, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
