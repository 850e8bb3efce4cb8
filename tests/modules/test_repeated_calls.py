"""One module and one trainer's data, for an evaluation and a run after each other, as in a notebook."""

import pytest

from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SequenceKD, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama


def models():
    return {"student": StudentSpec.of(tiny_llama(0)), "teacher": LocalTeacher.of(tiny_llama(1))}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_run_follows_an_evaluation_of_the_same_module(stage):
    def metrics(module):
        fit = trainer(max_epochs=1, limit_val_batches=1.0)
        fit.fit(module, datamodule=Letters(batch_size=4))
        return {name: value.item() for name, value in fit.callback_metrics.items()}

    measured = SupervisedKD(**models())
    getattr(trainer(), stage)(measured, datamodule=Letters(), verbose=False)
    assert metrics(measured) == metrics(SupervisedKD(**models()))


@pytest.mark.slow
@pytest.mark.parametrize("method", [GKD, SequenceKD])
def test_predict_returns_completions(method):
    """One for each row, with an EOS (1) at its end if it has ended and nowhere else."""
    parts = trainer().predict(method(**models()), datamodule=Letters(batch_size=4))
    rows = [row for part in parts for row in zip(part.ids, part.mask, part.ended, strict=True)]
    assert len(rows) == 12
    for ids, mask, ended in rows:
        completion = ids[mask].tolist()
        assert (completion[-1] == 1) == ended
        assert 1 not in completion[:-1]


def test_a_teacher_with_padded_logits_generates_tokens_that_the_tokenizer_has():
    wide = tiny_llama(1, vocab_size=64)
    module = SequenceKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(wide))
    parts = trainer().predict(module, datamodule=Letters(batch_size=4))
    assert max(int(part.ids.max()) for part in parts) < 18
