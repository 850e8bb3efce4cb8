import torch

from lightning_kd.models import DenseLogits
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher
from tests.support.toys import ragged_batch, tiny_llama

CPU = torch.device("cpu")


def given(teacher, batch, scored):
    """The logits of its only model."""
    (source,) = teacher.answer(batch, scored, logits_backend=DenseLogits()).sources
    return source.logits


def test_a_teacher_is_frozen_and_in_eval_mode(tokenizer):
    teacher = LocalTeacher.of(tiny_llama(attention_dropout=0.5))
    teacher.prepare(tokenizer, CPU, "equal")
    model = teacher.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    batch = ragged_batch([(2, 5), (3, 2)])
    scored = ScoredPositions.from_labels(batch["labels"])
    scores = given(teacher, batch, scored)
    assert scores.shape == (7, 18)
    assert not scores.requires_grad


def test_scores_do_not_depend_on_padding(tokenizer):
    teacher = LocalTeacher.of(tiny_llama())
    teacher.prepare(tokenizer, CPU, "equal")
    both = ragged_batch([(2, 5), (3, 2)])
    scored = ScoredPositions.from_labels(both["labels"])
    padded = given(teacher, both, scored)
    alone = {key: value[1:, :5] for key, value in both.items() if key != "row"}
    scored_alone = ScoredPositions.from_labels(alone["labels"])
    unpadded = given(teacher, alone, scored_alone)
    torch.testing.assert_close(padded[5:], unpadded, rtol=0, atol=1e-5)


def test_a_model_that_was_changed_between_two_runs_is_frozen_and_compared_again(tokenizer):
    network = tiny_llama(1, attention_dropout=0.5)
    teacher = LocalTeacher.of(network)
    teacher.prepare(tokenizer, CPU, "equal")
    before = teacher.resume_settings()["model"]["weights"]
    network.train()
    network.requires_grad_(True)
    with torch.no_grad():
        network.lm_head.weight.add_(1)
    teacher.prepare(tokenizer, CPU, "equal")
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert teacher.resume_settings()["model"]["weights"] != before
