import torch

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.scoring import ScoredPositions
from tests.support.toys import ragged_batch


def test_the_logits_before_a_label_are_scored():
    labels = torch.tensor([[IGNORE_INDEX, 4, 5], [IGNORE_INDEX, IGNORE_INDEX, 6]])
    scored = ScoredPositions.from_labels(labels)
    assert scored.mask.tolist() == [[True, True, False], [False, True, False]]
    assert scored.targets.tolist() == [4, 5, 6]
    assert scored.rows.tolist() == [0, 0, 1]


def test_everywhere_scores_real_tokens_and_counts_only_labels():
    batch = ragged_batch([(2, 2), (1, 1)])
    scored = ScoredPositions.everywhere(batch["labels"], batch["attention_mask"])
    assert scored.mask.sum().item() == 6
    assert scored.tokens_per_row.tolist() == [2, 1]
    assert (scored.targets == IGNORE_INDEX).sum().item() == 3


def test_half_precision_logits_are_widened_before_any_softmax():
    scored = ScoredPositions.from_labels(torch.tensor([[1, 2]]))
    assert scored.select(torch.zeros(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert scored.select(torch.zeros(1, 2, 3, dtype=torch.float64)).dtype == torch.float64
