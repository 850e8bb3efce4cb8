"""What an engine cannot do is refused before the first step, by name."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from lightning_kd import (
    GKD,
    SFT,
    CachedSampler,
    ContinuousBatchingSampler,
    Engine,
    GenerationOptions,
    LocalTeacher,
    SamplingOptions,
    StudentSpec,
    SupervisedKD,
    TransformersContinuousBatching,
)
from lightning_kd.callbacks import CompletionSamples, OnPolicyGeneration, OwnCompletions
from lightning_kd.generation import continuous, decoding, transformers_batching
from lightning_kd.models import sharding
from lightning_kd.schedules import Linear
from tests.support.harness import BatchList, Letters, trainer
from tests.support.toys import ragged_batch, tiny_llama, with_prompts

REFILLED = [ContinuousBatchingSampler, TransformersContinuousBatching]


def sliding():
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=18,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


class Never(ContinuousBatchingSampler):
    """Is refused before it generates."""

    def generate(self, prompts, options, *, seeds, models):
        raise AssertionError("it was asked to generate")


def models(student=None, teacher=None, **more):
    given = {"student": StudentSpec.of(student or tiny_llama(0))}
    return given | {"teacher": LocalTeacher.of(teacher or tiny_llama(1))} | more


def rollouts(**options):
    return OnPolicyGeneration(
        **({"generation": SamplingOptions(max_new_tokens=4), "table_every": 0} | options)
    )


def refused(module, callback, said, **settings):
    """Assert that a fit takes no step."""
    fit = trainer(max_steps=3, max_epochs=-1, callbacks=[callback], **settings)
    with pytest.raises(ValueError, match=said):
        fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 0
    assert fit.fit_loop.total_batch_idx == -1


# Models.


@pytest.mark.parametrize("lmbda", [1.0, Linear(start=0.0, end=1.0, steps=200)])
def test_a_student_is_refused_before_the_first_step(lmbda):
    refused(
        GKD(**models(student=sliding())),
        rollouts(lmbda=lmbda, engine=Never(2)),
        "MistralForCausalLM keeps DynamicSlidingWindowLayer.*choose engine: CachedSampler",
    )


@pytest.mark.parametrize(
    "options", [{"mixture_alpha": 0.2}, {"off_policy": "teacher", "lmbda": 0.5}]
)
def test_a_teacher_that_will_generate_is_refused_before_the_first_step(options):
    refused(
        GKD(**models(teacher=sliding())),
        rollouts(engine=Never(2), **options),
        "MistralForCausalLM keeps DynamicSlidingWindowLayer",
    )


def test_models_that_never_generate_are_not_looked_at():
    module = GKD(**models(student=sliding()))
    fit = trainer(max_steps=1, callbacks=[rollouts(engine=Never(2), lmbda=0.0)])
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 1
    module = GKD(**models(teacher=sliding()))
    fit = trainer(max_steps=1, callbacks=[rollouts(engine=ContinuousBatchingSampler(2))])
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 1


def test_an_obstacle_to_a_static_cache_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(decoding, "static_obstacle", lambda model: "it has an obstacle")
    lmbda = Linear(start=0.0, end=1.0, steps=200)
    said = "LlamaForCausalLM cannot generate with a static.*it has an obstacle; set cache: auto"
    refused(GKD(**models()), rollouts(lmbda=lmbda, engine=CachedSampler(cache="static")), said)
    CachedSampler().check_models([tiny_llama(0)])


def test_predict_refuses_the_student_before_the_first_batch():
    batch = with_prompts(ragged_batch([(2, 5), (5, 3)]))
    module = SupervisedKD(**models(student=sliding(), engine=Never(2)))
    with pytest.raises(ValueError, match="MistralForCausalLM keeps DynamicSlidingWindowLayer"):
        trainer().predict(module, datamodule=BatchList([], evaluate=[batch]))


@pytest.mark.parametrize("callback", [CompletionSamples, OwnCompletions])
def test_completions_of_a_validation_are_refused_before_the_first_step(callback):
    module = SupervisedKD(**models(student=sliding(), engine=Never(2)))
    said = "MistralForCausalLM keeps DynamicSlidingWindowLayer"
    refused(module, callback(max_new_tokens=4), said, limit_val_batches=1)


def test_a_student_that_generates_nothing_is_trained_with_any_engine():
    module = SFT(student=StudentSpec.of(sliding()), engine=Never(2))
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=Letters(batch_size=4))
    assert fit.global_step == 1


# Shards.


def test_shards_are_accepted_where_they_are_gathered_alone(monkeypatch):
    model, engine = tiny_llama(0), ContinuousBatchingSampler(2)
    engine.check_models([model])
    monkeypatch.setattr(continuous, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"is in shards.*on_policy\.unshard: true"):
        engine.check_models([model])
    with pytest.raises(ValueError, match="is in shards"):  # of FSDP1, or DeepSpeed
        engine.check_models([model], gathered=True)
    monkeypatch.setattr(continuous, "is_fsdp2_sharded", lambda model: True)
    engine.check_models([model], gathered=True)
    with pytest.raises(ValueError, match="is in shards"):
        engine.check_models([model])


def test_a_model_is_gathered_as_long_as_the_context_is_open():
    model, other = tiny_llama(0), tiny_llama(1)
    with sharding.unsharded([model]):
        assert sharding.is_gathered(model)
        assert not sharding.is_gathered(other)
    assert not sharding.is_gathered(model)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_thread_of_transformers_takes_no_shards(monkeypatch, gathered):
    monkeypatch.setattr(transformers_batching, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in shards.*engine: CachedSampler"):
        TransformersContinuousBatching().check_models([tiny_llama(0)], gathered=gathered)


# Options.


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.9}])
def test_tokens_that_are_cut_off_are_refused_when_the_options_are_given(cut):
    said = r"top_k \d and top_p .*choose engine: ContinuousBatchingSampler"
    with pytest.raises(ValueError, match=said):
        rollouts(engine=TransformersContinuousBatching(), generation=SamplingOptions(**cut))
    options = GenerationOptions(temperature=1.0, **cut)
    with pytest.raises(ValueError, match=said):
        GKD(**models(engine=TransformersContinuousBatching(), generation=options))


@pytest.mark.parametrize("engine", REFILLED)
def test_rows_at_once_are_not_for_engines_with_slots(engine):
    said = rf"rows_at_once is 4, and {engine.__name__} .*leave rows_at_once out.*CachedSampler"
    with pytest.raises(ValueError, match=said):
        rollouts(engine=engine(), rows_at_once=4)
    assert rollouts(engine=engine()).rows_at_once is None
    assert rollouts(rows_at_once=4).rows_at_once == 4


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (ContinuousBatchingSampler, "the class ContinuousBatchingSampler"),
        (Engine, "the class Engine"),
        ("ContinuousBatchingSampler", "'ContinuousBatchingSampler'"),
        (64, "64"),
    ],
)
def test_an_engine_is_an_instance(given, came):
    said = rf"engine is {came}; give an instance of Engine, such as .*\(slots=64\)"
    with pytest.raises(ValueError, match=said):
        OnPolicyGeneration(engine=given)
    with pytest.raises(ValueError, match=said):
        GKD(**models(engine=given))
