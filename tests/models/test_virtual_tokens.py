"""Adapters of peft that put tokens of their own in front of each row."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd import (
    SFT,
    CachedSampler,
    ContinuousBatchingSampler,
    GenerationOptions,
    LocalTeacher,
    OnPolicyDistillation,
    Prompts,
    SupervisedKD,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions, sample
from lightning_kd.models import StudentSpec
from lightning_kd.models.adapters import virtual_tokens
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
OPTIONS = GenerationOptions(max_new_tokens=5)


class Seen(Callback):
    """The batches of a run."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)


def adapted(kind):
    """Virtual tokens that make a difference."""
    torch.manual_seed(0)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_llama(3), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt" in name:
                parameter.normal_(std=2.0)
    return model


def by_full_passes(model, ids):
    with torch.no_grad():
        for _ in range(OPTIONS.max_new_tokens):
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids[:, IDS.shape[1] :]


def generated(engine, model):
    prompts = Prompts(IDS, torch.ones_like(IDS), frozenset({99}), 0)
    return engine.generate(prompts, OPTIONS, seeds=[0, 1], models=[(model, 1.0)]).ids


@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning"])
@pytest.mark.parametrize(
    "engine",
    [CachedSampler(), ContinuousBatchingSampler(2), TransformersContinuousBatching(2)],
    ids=lambda engine: type(engine).__name__,
)
def test_engines_that_would_leave_them_out_refuse_them_by_name(engine, kind):
    model = adapted(kind).eval()
    said = f"adapters of type {virtual_tokens(model)}.*choose engine: TransformersEngine"
    with pytest.raises(ValueError, match=said):
        engine.check_models([model])
    with pytest.raises(ValueError, match=said):
        generated(engine, model)
    inner = model.get_base_model()
    mask = torch.ones_like(IDS)
    left_out = sample([(inner, 1.0)], IDS, mask, OPTIONS, eos_ids={99}, pad_id=0, seeds=[0, 1]).ids
    assert not torch.equal(left_out, by_full_passes(model, IDS))


def test_prefixes_are_generated_with_by_transformers():
    model, engine = adapted("PrefixTuning").eval(), TransformersEngine()
    engine.check_models([model])
    assert torch.equal(generated(engine, model), by_full_passes(model, IDS))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("engine", [None, TransformersEngine()], ids=["default", "transformers"])
def test_prefixes_in_a_run_train_with_the_engine_that_can(engine):
    options = SamplingOptions(max_new_tokens=4)
    generation = OnPolicyGeneration(generation=options, engine=engine, table_every=0)
    module = OnPolicyDistillation(
        student=StudentSpec.of(adapted("PrefixTuning")), teacher=LocalTeacher.of(tiny_llama(1))
    )
    seen = Seen()
    run = trainer(max_steps=1, max_epochs=-1, callbacks=[generation, seen])
    if engine is None:
        with pytest.raises(ValueError, match=r"PREFIX_TUNING.*choose engine: TransformersEngine"):
            run.fit(module, datamodule=Letters(4, batch_size=4))
        assert seen.batches == []
    else:
        run.fit(module, datamodule=Letters(4, batch_size=4))
        assert len(seen.batches) == 1
        difference = run.callback_metrics["rollout/log_prob_difference_max"]
        assert float(difference) < 1e-4


@pytest.mark.parametrize("role", ["student", "teacher 0"])
def test_prompts_that_lengthen_rows_are_refused_before_training(role):
    prompted = adapted("PromptTuning")
    if role == "student":
        module = SFT(student=StudentSpec.of(prompted))
    else:
        teacher = LocalTeacher.of(prompted)
        module = SupervisedKD(student=StudentSpec.of(tiny_llama(0)), teacher=teacher)
    seen = Seen()
    said = "has adapters of type PROMPT_TUNING, whose tokens come out in front.*PREFIX_TUNING"
    with pytest.raises(ValueError, match=said):
        trainer(max_steps=1, max_epochs=-1, callbacks=[seen]).fit(
            module, datamodule=Letters(4, batch_size=4)
        )
    assert seen.batches == []
