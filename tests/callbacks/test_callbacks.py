import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_kd.batch import FILLER_ROW
from lightning_kd.callbacks import (
    CompletionSamples,
    HFExport,
    JsonlPredictions,
    TensorBoardLayout,
    TokensPerSecond,
)
from lightning_kd.callbacks.tensorboard_layout import LAYOUT
from lightning_kd.data import PromptCompletionData
from lightning_kd.models import LoRA, StudentSpec
from lightning_kd.modules import SFT, SequenceKD, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
IDS = torch.arange(2, 12)[None]


def events(logger):
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_an_exported_student_is_the_teacher_of_the_next_run(tmp_path, tokenizer):
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    callbacks = [HFExport(str(tmp_path / "student"))]
    trainer(max_steps=2, callbacks=callbacks).fit(module, datamodule=BatchList([BATCH] * 2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(model(IDS).logits, module.student.eval()(IDS).logits)
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id in (1, [1])
    has_teacher = SupervisedKD(
        student=StudentSpec.of(tiny_llama(5)), teacher=LocalTeacher(str(tmp_path / "student"))
    )
    fit = trainer(max_steps=1)
    fit.fit(has_teacher, datamodule=BatchList([BATCH]))
    assert fit.callback_metrics["train/forward_kl"].item() > 0


def test_lora_adapters_are_merged_into_the_export(tmp_path):
    module = SFT(
        student=StudentSpec.of(tiny_llama(0), lora=LoRA(r=2)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
    )
    trainer(max_steps=3, callbacks=[HFExport(str(tmp_path / "student"))]).fit(
        module, datamodule=BatchList([BATCH] * 3)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = module.student.eval()(input_ids=IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - tiny_llama(0)(IDS).logits).abs().max().item() > 1e-2


def test_predictions_are_jsonl_in_row_order_without_filler(tmp_path, tokenizer):
    filler = {k: v.clone() if torch.is_tensor(v) else v for k, v in BATCH.items()}
    filler["row"] = torch.tensor([FILLER_ROW, 7, 5])
    path = tmp_path / "out" / "predictions.jsonl"
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    trainer(callbacks=[JsonlPredictions(str(path))]).predict(
        module, datamodule=BatchList([], evaluate=[filler, BATCH]), return_predictions=False
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2, 5, 7]
    assert [row["prompt"] for row in rows] == [BATCH["prompt"][i] for i in (0, 1, 2, 2, 1)]
    assert rows[0]["reference"] == BATCH["completion"][0]
    assert list(path.parent.iterdir()) == [path]


def test_predictions_never_overwrite_their_prompts(tokenizer):
    Path("prompts.jsonl").write_text('{"prompt": "ab"}')
    module = SFT(student=StudentSpec.of(tiny_llama(0)))
    data = PromptCompletionData(tokenizer=tokenizer, predict="*.jsonl")
    with pytest.raises(
        ValueError, match=r"predictions.path is 'prompts.jsonl', which this run reads"
    ):
        trainer(callbacks=[JsonlPredictions("prompts.jsonl")]).predict(
            module, datamodule=data, return_predictions=False
        )
    assert Path("prompts.jsonl").read_text() == '{"prompt": "ab"}'


def test_sequence_kd_trains_on_completions_of_the_teacher(tmp_path):
    teacher = tiny_llama(4)
    module = SequenceKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(teacher))
    path = tmp_path / "teacher.jsonl"
    trainer(callbacks=[JsonlPredictions(str(path))]).predict(
        module, datamodule=BatchList([], evaluate=[BATCH]), return_predictions=False
    )
    by_teacher = trainer(callbacks=[JsonlPredictions(str(tmp_path / "sft.jsonl"))])
    by_teacher.predict(
        SFT(student=StudentSpec.of(tiny_llama(4))),
        datamodule=BatchList([], evaluate=[BATCH]),
        return_predictions=False,
    )
    assert path.read_text() == (tmp_path / "sft.jsonl").read_text()
    written = [json.loads(line)["completion"] for line in path.read_text().splitlines()]
    assert written != BATCH["completion"]


def test_exact_match_and_samples_are_logged_to_tensorboard(tmp_path, tokenizer):
    student = tiny_llama(0)
    greedy = student.eval().generate(
        BATCH["prompt_ids"], attention_mask=BATCH["prompt_mask"], max_new_tokens=5, do_sample=False
    )[:, BATCH["prompt_ids"].shape[1] :]
    right = tokenizer.decode(greedy[0], skip_special_tokens=True)
    hostile = "<script>|x|"
    batch = BATCH | {"completion": [right, "wrong", hostile]}
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    fit = trainer(
        limit_val_batches=1.0,
        logger=logger,
        callbacks=[CompletionSamples(max_new_tokens=5, samples=3)],
    )
    (result,) = fit.validate(
        SFT(student=StudentSpec.of(tiny_llama(0))),
        datamodule=BatchList([], evaluate=[batch]),
        verbose=False,
    )
    assert result["val/exact_match"] == pytest.approx(1 / 3)
    text = events(logger).Tensors("val/samples/text_summary")[-1].tensor_proto.string_val[0]
    assert BATCH["prompt"][0].encode() in text
    assert b"&lt;script&gt;&#124;x&#124;" in text
    assert b"<script>" not in text


def test_the_layout_and_tokens_per_second_are_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", default_hp_metric=False)
    callbacks = [TensorBoardLayout(), TokensPerSecond()]
    fit = trainer(max_steps=2, accumulate_grad_batches=2, logger=logger, callbacks=callbacks)
    fit.fit(SFT(student=StudentSpec.of(tiny_llama(0))), datamodule=BatchList([BATCH] * 4))
    seen = events(logger)
    layout = layout_pb2.Layout()
    (summary,) = seen.Tensors("custom_scalars__config__")
    layout.ParseFromString(summary.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    rates = [event.value for event in seen.Scalars("train/tokens_per_second")]
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)
    assert [event.step for event in seen.Scalars("train/loss")] == [0, 1]


@pytest.mark.parametrize("arguments", [{"batches": 0}, {"samples": -1}, {"max_new_tokens": 0}])
def test_invalid_values_are_rejected(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CompletionSamples(**arguments)
