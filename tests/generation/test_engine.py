"""An engine of a third party, by public names alone; and what engines cannot do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from lightning_kd import (
    GKD,
    SFT,
    CachedSampler,
    Completions,
    Engine,
    GenerationOptions,
    LocalTeacher,
    OnPolicyDistillation,
    Prompts,
    SamplingOptions,
    SequenceKD,
    StudentSpec,
    SupervisedKD,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.callbacks import CompletionSamples, OnPolicyGeneration
from lightning_kd.generation import generate
from tests.callbacks.test_on_policy_generation import Saves, Seen, fit
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

TEXTS = [[5, 6, 1], [7, 1], [8, 9, 10, 11]]
"""Completions of the list; the last one has no end."""


class ListedEngine(Engine):
    """Returns completions of a list: that of a row is the one that its seed points to."""

    seeds_rows = True

    def __init__(self, texts: Sequence[Sequence[int]] = TEXTS) -> None:
        self.texts = [list(text) for text in texts]
        self._updates: list[torch.Tensor] = []
        self._calls: list[list[int]] = []

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        models: Sequence[tuple[PreTrainedModel, float]],
    ) -> Completions:
        chosen = [self.texts[seed % len(self.texts)][: options.max_new_tokens] for seed in seeds]
        self._calls.append([seed % len(self.texts) for seed in seeds])
        return Completions.of_tokens(
            chosen, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id, device=prompts.ids.device
        )

    def update(self, student: PreTrainedModel) -> None:
        self._updates.append(weights(student))


class Refusing(ListedEngine):
    """Generates with no model at all."""

    def check_models(self, models: Sequence[PreTrainedModel], *, gathered: bool = False) -> None:
        raise ValueError("no student like this")


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


class Kept(Callback):
    """What each batch of predict was given."""

    def __init__(self) -> None:
        self.found: list[Completions] = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.found.append(outputs)


def models(**more: Any) -> dict[str, Any]:
    student, teacher = StudentSpec.of(tiny_llama(0)), LocalTeacher.of(tiny_llama(1))
    return {"student": student, "teacher": teacher, **more}


def evaluated() -> BatchList:
    batch = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2)]))
    return BatchList([], evaluate=[batch, batch])


def test_gkd_trains_on_the_completions_of_a_list():
    engine = ListedEngine()
    _, seen = fit(GKD(**models()), steps=3, options={"engine": engine})
    assert len(seen.batches) == len(engine._calls) == 3
    for batch, call in zip(seen.batches, engine._calls, strict=True):
        assert not {"log_probs", "sampling_log_probs"} & batch.keys()
        for row, text in enumerate(call):
            completion = batch["completion_mask"][row]
            assert batch["input_ids"][row][completion].tolist() == TEXTS[text]
            assert batch["labels"][row][completion].tolist() == TEXTS[text]
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            assert batch["input_ids"][row][: len(prompt)].tolist() == prompt.tolist()
    assert {text for call in engine._calls for text in call} == {0, 1, 2}


@pytest.mark.filterwarnings("ignore:In this window no completion ended")
def test_what_has_no_end_is_known_without_log_probs():
    engine = ListedEngine([[8, 9, 10]])
    _, seen = fit(GKD(**models()), steps=1, options={"engine": engine, "truncated": "mask"})
    assert (seen.batches[0]["labels"] < 0).all()


def test_the_engine_gets_new_weights_once_before_each_window():
    engine = ListedEngine()
    module = GKD(**models())
    before = weights(tiny_llama(0))
    fit(module, steps=4, options={"engine": engine, "passes": 2, "rows_at_once": 1})
    assert len(engine._updates) == 2
    assert len(engine._calls) == 2 * 4
    assert torch.equal(engine._updates[0], before)
    assert not torch.equal(engine._updates[1], before)


def test_predict_returns_the_completions_of_a_list():
    engine = ListedEngine()
    module = SupervisedKD(**models(engine=engine))
    kept = Kept()
    trainer(callbacks=[kept]).predict(module, datamodule=evaluated(), return_predictions=False)
    rows = [text for call in engine._calls for text in call]
    texts = [
        ids[mask].tolist()
        for part in kept.found
        for ids, mask in zip(part.ids, part.mask, strict=True)
    ]
    assert texts == [TEXTS[row] for row in rows]
    assert all(part.log_probs is None for part in kept.found)
    assert len(engine._updates) == 1  # nothing has changed between two batches
    assert torch.equal(engine._updates[0], weights(module.student))


def test_samples_come_from_the_module_s_engine_and_its_newest_weights():
    engine = ListedEngine()
    module = SupervisedKD(**models(engine=engine))
    callbacks = [CompletionSamples(max_new_tokens=4), seen := Seen()]
    data = Letters(batch_size=4)
    data.val_dataloader = evaluated().val_dataloader
    trainer(
        max_steps=2, max_epochs=-1, limit_val_batches=2, val_check_interval=1, callbacks=callbacks
    ).fit(module, datamodule=data)
    assert len(seen.batches) == 2
    assert len(engine._calls) == 2 * 2
    assert len(engine._updates) == 2
    assert not torch.equal(*engine._updates)
    assert torch.equal(engine._updates[1], weights(module.student))


def test_an_engine_of_a_teacher_does_not_get_the_student():
    engine = ListedEngine()
    module = SequenceKD(**models(engine=engine))
    trainer().predict(module, datamodule=evaluated(), return_predictions=False)
    assert len(engine._calls) == 2
    assert engine._updates == []


# What an engine cannot do.


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        (TransformersContinuousBatching(), {"temperature": 1.0, "top_k": 3}, "top_k 3 and top_p"),
        (Refusing(), {}, "no student like this"),
        (None, {}, "keeps no key-value cache"),
    ],
    ids=["options", "model", "default engine"],
)
def test_samples_that_cannot_be_generated_are_refused_before_the_first_step(engine, options, said):
    student = tiny_llama(0)
    if engine is None:
        config = MambaConfig(vocab_size=18, hidden_size=16, num_hidden_layers=1, state_size=4)
        student = MambaForCausalLM(config)
    module, seen = SFT(student=StudentSpec.of(student), engine=engine), Seen()
    callbacks = [CompletionSamples(max_new_tokens=4, **options), seen]
    run = trainer(max_steps=2, max_epochs=-1, callbacks=callbacks)
    with pytest.raises(ValueError, match=said):
        run.fit(module, datamodule=Letters(batch_size=4))
    assert seen.batches == []


def test_a_policy_gradient_without_log_probs_is_refused_before_the_first_step():
    engine = ListedEngine()
    refused = "OnPolicyDistillation needs the log-prob.*which ListedEngine does not give; choose"
    with pytest.raises(ValueError, match=refused):
        fit(OnPolicyDistillation(**models()), options={"engine": engine})
    assert engine._calls == []


@pytest.mark.parametrize("engine", [ListedEngine, TransformersEngine])
def test_a_mixture_is_refused_by_an_engine_without_mixtures(tokenizer, engine):
    refused = f"{engine.__name__} cannot sample from a mixture of two models; set mixture_alpha: 0"
    with pytest.raises(ValueError, match=refused):
        OnPolicyGeneration(engine=engine(), mixture_alpha=0.2)
    batch = with_prompts(ragged_batch([(2, 5)]))
    with pytest.raises(ValueError, match=refused):
        generate(
            tiny_llama(0),
            tokenizer,
            batch["prompt_ids"],
            batch["prompt_mask"],
            SamplingOptions(max_new_tokens=4),
            seeds=[1],
            engine=engine(),
            mixed_with=(tiny_llama(1), 0.2),
        )


@pytest.mark.parametrize("engine", [ListedEngine, CachedSampler])
def test_beams_are_refused_by_an_engine_without_beam_search(engine):
    with pytest.raises(ValueError, match=f"num_beams is 3, but {engine.__name__} has no beam"):
        SupervisedKD(**models(engine=engine(), generation=GenerationOptions(num_beams=3)))


class Short(ListedEngine):
    """Forgets a row."""

    def generate(self, prompts, options, *, seeds, models):
        return super().generate(prompts, options, seeds=seeds[1:], models=models)


class Boasting(ListedEngine):
    """Says that it gives log-probabilities, and does not."""

    gives_log_probs = True


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Short, "Short returned 3 completions for 4 prompts"),
        (
            Boasting,
            "Boasting has gives_log_probs: True, but returned completions without log_probs",
        ),
    ],
)
def test_an_engine_that_breaks_its_promise_is_named(engine, said):
    with pytest.raises(ValueError, match=said):
        fit(GKD(**models()), options={"engine": engine()})


# Which engine it was.


def test_the_default_engine_is_the_sampler_and_that_of_transformers_for_beams():
    assert isinstance(OnPolicyGeneration().engine, CachedSampler)
    beams = OnPolicyGeneration(generation=SamplingOptions(num_beams=2))
    assert isinstance(beams.engine, TransformersEngine)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, TransformersEngine(), "on_policy.engine"),
        (ListedEngine(), ListedEngine([[5, 1]]), "on_policy.engine.texts"),
    ],
)
def test_another_engine_is_refused_on_a_resume(tmp_path, before, after, said):
    fit(GKD(**models()), options={"engine": before}, more=[Saves(tmp_path)])
    with pytest.raises(ValueError, match=said):
        fit(GKD(**models()), options={"engine": after}, ckpt=tmp_path / "step1.ckpt")


def test_the_sampler_by_name_is_the_default_on_a_resume(tmp_path):
    fit(GKD(**models()), more=[Saves(tmp_path)])
    options = {"engine": CachedSampler(), "rows_at_once": 2}
    _, seen = fit(GKD(**models()), options=options, ckpt=tmp_path / "step1.ckpt")
    assert len(seen.batches) == 1


def test_rows_at_once_may_not_change_where_rows_share_random_numbers(tmp_path):
    engine = {"engine": TransformersEngine()}
    fit(GKD(**models()), options=engine, more=[Saves(tmp_path)])
    with pytest.raises(ValueError, match=r"on_policy\.rows_at_once: None -> 2"):
        fit(
            GKD(**models()),
            options=engine | {"rows_at_once": 2},
            ckpt=tmp_path / "step1.ckpt",
        )


# Completions that are not what an engine must return.


class Spoilt(CachedSampler):
    """The sampler, whose completions a function changes."""

    def __init__(self, change) -> None:
        super().__init__()
        self._change = change

    def generate(self, prompts, options, *, seeds, models):
        return self._change(super().generate(prompts, options, seeds=seeds, models=models))


def with_gap(completions):
    mask = completions.mask.clone()
    mask[:, 0] = False
    return replace(completions, mask=mask)


def beyond_the_end(completions):
    return replace(completions, mask=torch.ones_like(completions.mask))


def with_nan(completions):
    return replace(completions, sampling_log_probs=completions.log_probs * torch.nan)


WRONG = {
    "nothing": (lambda c: None, "returned NoneType; return Completions"),
    "fewer rows": (lambda c: c.rows(slice(1, None)), "returned 3 completions for 4 prompts"),
    "fewer columns of log_probs": (
        lambda c: replace(c, log_probs=c.log_probs[:, :2]),
        r"returned log_probs of shape \(4, 2\)",
    ),
    "fewer rows of mask": (lambda c: replace(c, mask=c.mask[1:]), "returned mask of shape"),
    "integers for the mask": (lambda c: replace(c, mask=c.mask.long()), "mask of .* torch.int64"),
    "floats for ids": (lambda c: replace(c, ids=c.ids.float()), "returned ids of .* torch.float32"),
    "one ended for all": (lambda c: replace(c, ended=c.ended[:1]), r"ended of shape \(1,\)"),
    "negated log_probs": (
        lambda c: replace(c, log_probs=-c.log_probs),
        "returned log_probs that are no log-probabilities",
    ),
    "probabilities": (
        lambda c: replace(c, sampling_log_probs=c.log_probs.exp()),
        "returned sampling_log_probs that are no log-probabilities",
    ),
    "not a number": (with_nan, "sampling_log_probs that are no log-probabilities"),
    "one of the two alone": (
        lambda c: replace(c, log_probs=None),
        "return both, or set it to False",
    ),
    "padding on the left": (with_gap, "a mask with gaps; a completion is padded on the right"),
    "text behind the EOS": (beyond_the_end, "goes on behind its EOS"),
    "ended without an EOS": (
        lambda c: replace(c, ended=torch.ones_like(c.ended)),
        "ended that is not true where a completion has an EOS",
    ),
    "an EOS that has not ended": (
        lambda c: replace(c, ended=torch.zeros_like(c.ended)),
        "ended that is not true where a completion has an EOS",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_completions_are_refused_before_they_are_trained_on(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fit(OnPolicyDistillation(**models()), steps=4, options={"engine": Spoilt(change)})


@pytest.mark.parametrize("truncated", ["keep", "mask"])
def test_windows_of_empty_completions_are_a_warning_then_an_error(truncated):
    def empty(completions):
        nothing = torch.zeros_like(completions.mask)
        return replace(completions, mask=nothing, ended=nothing[:, 0])

    warned = pytest.warns(UserWarning, match="0 tokens were scored")
    with warned, pytest.raises(ValueError, match="in 3 consecutive windows"):
        fit(
            OnPolicyDistillation(**models()),
            steps=4,
            options={"engine": Spoilt(empty), "truncated": truncated},
        )


def test_log_probs_that_some_completions_lack_are_left_out_of_all():
    class Sometimes(Spoilt):
        gives_log_probs = False

    seen = []

    def lacking(completions):
        seen.append(None)
        if len(seen) % 2:
            return completions
        return replace(completions, log_probs=None, sampling_log_probs=None)

    _, given = fit(GKD(**models()), options={"engine": Sometimes(lacking), "rows_at_once": 2})
    assert not {"log_probs", "sampling_log_probs"} & given.batches[0].keys()
