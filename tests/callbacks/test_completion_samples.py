"""Metrics of completions in a run: generated once, logged by name, on all ranks."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import BLEUScore, EditDistance, ROUGEScore

from lightning_kd import SFT, ChatData, Engine, PackedTextData, PromptCompletionData
from lightning_kd.batch import FILLER_ROW
from lightning_kd.callbacks import CompletionSamples
from lightning_kd.callbacks.reference_checks import check_states, check_works, measure
from lightning_kd.evaluation import (
    CompletionMetric,
    DistinctN,
    ExactMatch,
    GSM8KAccuracy,
    Repetition,
    RougeL,
    as_metric,
)
from lightning_kd.generation import Completions
from tests.support.harness import BatchList, trainer
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(3, 2), (2, 4), (4, 1)]))


def validated(samples, *batches, **settings):
    fit = trainer(limit_val_batches=1.0, callbacks=[samples], **settings)
    (result,) = fit.validate(
        SFT(student=tiny_llama(0)),
        datamodule=BatchList([], evaluate=batches or [BATCH]),
        verbose=False,
    )
    return result


def by_transformers(batch=BATCH, tokens=6):
    greedy = (
        tiny_llama(0)
        .eval()
        .generate(
            batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            max_new_tokens=tokens,
            do_sample=False,
        )
    )
    behind = greedy[:, batch["prompt_ids"].shape[1] :]
    return letter_tokenizer().batch_decode(behind, skip_special_tokens=True)


class Kept(Metric):
    """Keeps what it is given, and counts how often."""

    needs_references = False

    def __init__(self):
        super().__init__()
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="sum")
        self.rows = []

    def update(self, completions, references):
        self.updates = self.updates + 1
        self.rows += zip(completions, references, strict=True)

    def compute(self):
        return {"updates": self.updates, "rows": torch.tensor(float(len(self.rows)))}


def length(completion, references):
    return float(len(completion))


def test_one_generation_feeds_all_metrics(monkeypatch):
    calls = []
    complete = SFT.complete
    monkeypatch.setattr(
        SFT, "complete", lambda *a, **k: calls.append(k["purpose"]) or complete(*a, **k)
    )
    texts, kept = by_transformers(), Kept()
    batch = BATCH | {"references": [[texts[0], "x"], ["x", texts[1]], ["x"]]}
    metrics = [ExactMatch(), RougeL(), BLEUScore(n_gram=1), length, kept]
    found = validated(CompletionSamples(6, metrics=metrics), batch)
    assert calls == ["samples"]
    assert kept.rows == list(zip(texts, batch["references"], strict=True))
    assert found["val/exact_match"] == pytest.approx(2 / 3)
    assert found["val/length"] == pytest.approx(sum(map(len, texts)) / 3)
    assert found["val/updates"] == 1
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score_multi(references, text)["rougeL"].fmeasure
        for text, references in zip(texts, batch["references"], strict=True)
    ]
    assert found["val/rouge_l"] == pytest.approx(sum(rouge) / len(rouge))
    bleu = BLEUScore(n_gram=1)
    bleu.update(texts, batch["references"])
    assert found["val/bleu_score"] == pytest.approx(bleu.compute().item())


def test_filler_rows_and_batches_beyond_are_left_out():
    kept = Kept()
    filled = BATCH | {"row": torch.tensor([0, FILLER_ROW, 2])}
    found = validated(CompletionSamples(4, batches=2, metrics=[kept]), filled, BATCH, BATCH)
    assert found["val/rows"] == 5
    assert kept.rows[:2] == [kept.rows[2], kept.rows[4]]


def test_samples_are_seeded_by_run_row_and_number(monkeypatch):
    def sampled(number, seed="0"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        kept = Kept()
        options = {"temperature": 1.0, "completions_per_prompt": number}
        validated(CompletionSamples(8, metrics=[kept], **options))
        return [text for text, _ in kept.rows]

    three = sampled(3)
    assert len(three) == 9
    assert sampled(3) == three
    assert sampled(1) == three[::3]
    assert sampled(3, seed="7") != three
    assert len(set(three[:3])) > 1


def test_a_completion_is_cut_before_it_is_measured():
    texts, kept = by_transformers(), Kept()
    stop = max(texts, key=len)[2]
    validated(CompletionSamples(6, metrics=[kept], stop_strings=[stop]))
    assert [text for text, _ in kept.rows] == [text.split(stop)[0] for text in texts]
    assert [text for text, _ in kept.rows] != texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": [3]}, "metrics has 3; give metrics"),
        ({"completions_per_prompt": 2}, "completions_per_prompt is 2 at temperature 0"),
        ({"completions_per_prompt": 0, "temperature": 1.0}, "completions_per_prompt is 0"),
        ({"stop_strings": [""]}, "one of stop_strings is empty"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompletionSamples(**arguments)


def loss(completion, references):
    return 1.0


def bleu_score(completion, references):
    return 1.0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([ExactMatch(), ExactMatch()], "ExactMatch would log exact_match, a name that another"),
        ([loss], "CompletionSamples and SFT would both log val/loss"),
        ([BLEUScore(), bleu_score], "bleu_score would log bleu_score, a name that another"),
    ],
)
def test_a_name_is_that_of_one_number(metrics, message):
    with pytest.raises(ValueError, match=message):
        validated(CompletionSamples(2, metrics=metrics))


@pytest.mark.parametrize(
    ("others", "name"), [([ExactMatch()], "exact_match"), ([Repetition()], "completions_cut")]
)
def test_two_that_log_one_name_are_refused_before_the_first_step(others, name):
    """Lightning would log the mean of the two."""
    fit = trainer(
        max_steps=1,
        limit_val_batches=1.0,
        callbacks=[CompletionSamples(3), CompletionSamples(2, metrics=others)],
    )
    with pytest.raises(
        ValueError, match=f"CompletionSamples and CompletionSamples would both log val/{name}"
    ):
        fit.fit(SFT(student=tiny_llama(0)), datamodule=prompts(ROWS))
    assert fit.global_step == 0


def test_the_share_of_completions_that_are_cut_is_logged():
    """Of those with the largest number of tokens, the ones without an EOS or a stop string."""

    class Given(Engine):
        def generate(self, prompts, options, *, seeds, models):
            texts = [[4, 5, 6], [4, 5, 1], [4, 5], [7, 8, 9]]
            return Completions.of_tokens(texts, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id)

    batch = with_prompts(ragged_batch([(3, 2), (2, 4), (4, 1), (2, 2)]))
    stop = letter_tokenizer().decode([8])

    def share(rows=(0, 1, 2, 3), **options):
        fit = trainer(limit_val_batches=1.0, callbacks=[CompletionSamples(3, **options)])
        (found,) = fit.validate(
            SFT(student=tiny_llama(0), engine=Given()),
            datamodule=BatchList([], evaluate=[batch | {"row": torch.tensor(rows)}]),
            verbose=False,
        )
        return found["val/completions_cut"]

    assert share() == pytest.approx(2 / 4)
    assert share(stop_strings=[stop]) == pytest.approx(1 / 4)
    assert share((0, FILLER_ROW, 2, 3)) == pytest.approx(2 / 3)


def test_metrics_that_were_given_are_refused_in_a_fit_without_validation():
    def fitted(**options):
        fit = trainer(max_steps=1, callbacks=[CompletionSamples(2, **options)])
        fit.fit(SFT(student=tiny_llama(0)), datamodule=prompts(ROWS))

    with pytest.raises(
        ValueError, match="CompletionSamples evaluates in validations, and this fit"
    ):
        fitted(metrics=[ExactMatch()])
    fitted()


ROWS = [{"prompt": "abc", "completion": "de"}, {"prompt": "ab", "completion": ["f", "gh"]}]


def prompts(rows, **options):
    return PromptCompletionData(
        train=ROWS, validation=rows, tokenizer=letter_tokenizer(), **options
    )


def run(data, metrics, **settings):
    """Train for two steps, with a validation before and behind."""
    fit = trainer(
        callbacks=[CompletionSamples(3, metrics=metrics), *settings.pop("callbacks", [])],
        **{"limit_val_batches": 1.0, "max_steps": 2, "max_epochs": -1, "num_sanity_val_steps": 2}
        | {"enable_checkpointing": True}
        | settings,
    )
    fit.fit(SFT(student=tiny_llama(0)), datamodule=data)
    return fit


@pytest.mark.parametrize(
    ("data", "metrics", "message"),
    [
        (
            prompts([{"prompt": "abc", "completion": "de"}]),
            [GSM8KAccuracy()],
            "data.validation: GSM8KAccuracy reads .* 'de' has none",
        ),
        (
            PackedTextData(
                train=[{"text": "abcdefgh" * 4}],
                validation=[{"text": "abcdefgh" * 4}],
                block_length=8,
                tokenizer=letter_tokenizer(),
            ),
            [Repetition()],
            "is to measure Repetition, and data.validation has no prompts",
        ),
    ],
    ids=["no answers", "no prompts"],
)
def test_a_metric_without_what_it_needs_is_refused_before_training(data, metrics, message):
    with pytest.raises(ValueError, match=message):
        run(data, metrics, num_sanity_val_steps=0 if "answers" in message else 2)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_prompts_alone_are_for_metrics_without_references(command):
    def found(metrics):
        data = prompts(rows, test=rows, completion_column=None)
        fit = trainer(callbacks=[CompletionSamples(3, metrics=metrics)], limit_val_batches=1.0)
        getattr(fit, command)(SFT(student=tiny_llama(0)), datamodule=data, verbose=False)
        return fit.callback_metrics

    rows = [{"prompt": "abc"}]
    stage, split = ("val", "validation") if command == "validate" else ("test", "test")
    assert f"{stage}/distinct_1" in found([DistinctN([1])])
    with pytest.raises(ValueError, match=f"data.{split}: RougeL compares .* the data has none"):
        found([Repetition(), RougeL()])


def test_packed_text_is_passed_over_where_no_metric_was_asked_for():
    text = [{"text": "abcdefgh" * 4}]
    data = PackedTextData(train=text, validation=text, block_length=8, tokenizer=letter_tokenizer())
    assert "val/exact_match" not in run(data, None).callback_metrics


def watching(monitor):
    return EarlyStopping(monitor, mode="max")


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("val/exact_mach", "did you mean val/exact_match"),
        ("exact_match", "did you mean val/exact_match"),
        ("val/gsm8k_accuracy", ".*val/cross_entropy, val/exact_match, val/loss"),
    ],
)
def test_a_misspelt_monitor_is_refused_before_the_first_step(monitor, message, tmp_path):
    for callback in (watching(monitor), ModelCheckpoint(tmp_path / "saved", monitor=monitor)):
        with pytest.raises(ValueError, match=f"monitors {monitor}, which is not logged; {message}"):
            run(prompts(ROWS), None, callbacks=[callback])
        assert not list(tmp_path.rglob("*.ckpt"))


def test_a_monitor_of_training_may_come_later(tmp_path):
    saving = ModelCheckpoint(tmp_path / "saved", monitor="train/loss", every_n_train_steps=1)
    assert run(prompts(ROWS), None, callbacks=[saving]).global_step == 2


def test_what_is_compared_are_all_completions_of_a_row():
    kept = Kept()
    data = prompts([*ROWS, {"prompt": "a", "completion": "b"}], batch_size=2)
    fit = trainer(callbacks=[CompletionSamples(3, metrics=[kept])], limit_val_batches=1.0)
    fit.validate(SFT(student=tiny_llama(0)), datamodule=data, verbose=False)
    assert [references for _, references in kept.rows] == [["de"], ["f", "gh"], ["b"]]


def test_a_chat_is_compared_with_its_answer():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}"
    )
    asked = [{"role": "user", "content": "abc"}]
    answered = [*asked, {"role": "assistant", "content": "de"}]
    kept, data = Kept(), {}
    for name, rows in (("answered", answered), ("asked", asked)):
        data[name] = ChatData(
            train_on="last" if name == "answered" else "none",
            validation=[{"messages": rows}],
            tokenizer=tokenizer,
        )
        fit = trainer(callbacks=[CompletionSamples(3, metrics=[kept])], limit_val_batches=1.0)
        fit.validate(SFT(student=tiny_llama(0)), datamodule=data[name], verbose=False)
    assert [references for _, references in kept.rows] == [["de"], []]


def test_processes_refuse_what_they_cannot_add_up():
    check_states([ROUGEScore(rouge_keys="rougeL")], 1)
    with pytest.raises(ValueError, match=r"ROUGEScore keeps rougeL_fmeasure .* 2 processes"):
        check_states([ExactMatch(), ROUGEScore(rouge_keys="rougeL")], 2)

    class Wrong(MeanMetric):
        def __init__(self):
            super().__init__()
            self.add_state("mean_of", torch.tensor(0.0), dist_reduce_fx="mean")

    with pytest.raises(ValueError, match="Wrong keeps mean_of"):
        check_states([Wrong()], 2)
    check_states([ExactMatch(), DistinctN(), Repetition(), BLEUScore()], 2)


@pytest.mark.parametrize(
    "metric", [BLEUScore(sync_on_compute=False), as_metric(EditDistance(sync_on_compute=False))]
)
def test_a_metric_of_each_process_for_itself_is_refused_where_there_are_several(metric):
    check_states([metric], 1)
    with pytest.raises(ValueError, match=r"(BLEUScore|EditDistance) has sync_on_compute=False"):
        check_states([metric], 2)


def test_a_metric_that_cannot_measure_here_is_named_before_the_first_batch(monkeypatch):
    def update(self, completions, references):
        raise LookupError("\n****\n  Resource punkt not found.\n  more\n****\n")

    monkeypatch.setattr(BLEUScore, "update", update)
    message = r"BLEUScore cannot measure a text here \(LookupError: Resource punkt not found\.\)"
    with pytest.raises(ValueError, match=message):
        check_works([BLEUScore()])


def test_a_metric_of_torchmetrics_that_was_tried_has_measured_nothing():
    metric = BLEUScore()
    check_works([metric])
    assert not metric.update_called


def test_a_metric_of_ones_own_that_raises_is_named_with_a_completion():
    class Own(CompletionMetric):
        def update(self, completions, references):
            raise KeyError("k")

        def compute(self):
            return {}

    with pytest.raises(ValueError, match="the metric Own failed for the completion 'a': KeyError"):
        measure(Own(), ["a"], [["b"]])
