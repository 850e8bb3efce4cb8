"""What users of other trainers hand over: the message says what to give."""

import pytest
import torch

from lightning_kd.divergences import ReverseKL
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT, SupervisedKD
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

BATCH = ragged_batch([(2, 3), (1, 5)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": 3}, "student is a int; give the name or directory of a model"),
        ({"student": SFT}, r"student is a class \(SFT\)"),
        ({"teacher": torch.nn.Linear(2, 2)}, "teacher is a Linear; give the name or directory"),
        ({"teacher": [tiny_llama(1), 3]}, "member 1 of TeacherEnsemble is a int"),
        ({"generation": {"max_new_tokens": 4}}, "generation is a dict; give GenerationOptions"),
        ({"divergence": ReverseKL}, "give a name or an instance, such as ReverseKL"),
    ],
    ids=["a number", "a method", "a layer", "a number in a list", "a dict", "a class"],
)
def test_other_types_are_refused_when_the_module_is_made(options, message):
    given = {"student": tiny_llama(0), "teacher": tiny_llama(1)}
    with pytest.raises(ValueError, match=message):
        SupervisedKD(**given | options)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_compiled_model_is_refused_with_what_to_compile(role):
    given = {"student": tiny_llama(0), "teacher": tiny_llama(1)}
    with pytest.raises(ValueError, match=f"the {role} is a model that torch.compile has wrapped"):
        SupervisedKD(**given | {role: torch.compile(tiny_llama(2), backend="eager")})


@pytest.mark.parametrize(
    "batch",
    [
        {key: value for key, value in BATCH.items() if key != "labels"},
        {key: value for key, value in BATCH.items() if key != "attention_mask"},
        BATCH | {"input_ids": BATCH["input_ids"].float()},
        BATCH | {"labels": BATCH["labels"][:, 1:]},
        [BATCH["input_ids"], BATCH["labels"]],
        {"text": ["a", "b"]},
    ],
    ids=["no labels", "no mask", "floats", "other lengths", "a list", "text"],
)
def test_batches_of_another_form_are_refused(batch):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    with pytest.raises(
        ValueError, match=r"needs input_ids, attention_mask and labels|has no labels"
    ):
        trainer(max_steps=1).fit(module, datamodule=BatchList([batch]))


def test_a_batch_of_these_three_is_enough():
    needed = {key: BATCH[key] for key in ("input_ids", "attention_mask", "labels")}
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=BatchList([needed]))
    assert torch.isfinite(fit.callback_metrics["train/loss"])


MASK, LABELS = BATCH["attention_mask"], BATCH["labels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": MASK.cumsum(-1)}, "the batch has position_ids, which is not read"),
        (
            {"attention_mask": MASK.flip(-1), "labels": LABELS.flip(-1)},
            "rows that are trained on or evaluated are padded on the right",
        ),
        ({"labels": torch.full_like(LABELS, 3)}, "labels on padding, where attention_mask is 0"),
    ],
    ids=["positions", "padding on the left", "labels on padding"],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_batches_of_another_layout_are_refused(change, message, stage):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    wrong = [BATCH | change]
    with pytest.raises(ValueError, match=message):
        getattr(trainer(limit_val_batches=1.0), stage)(module, datamodule=BatchList(wrong, wrong))
