"""The student writes and the teacher replaces: both limits, the distribution in between, refusals."""

import numpy as np
import pytest
import torch

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import (
    CachedSampler,
    GenerationOptions,
    Prompts,
    SamplingOptions,
    SpeculativeSampler,
    generate,
)
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, SFT, OnPolicyDistillation, SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import GradientProbe, Letters, trainer
from tests.support.sparse_teachers import Tells
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

BATCH = with_prompts(ragged_batch([(2, 5), (5, 3), (1, 2), (4, 1)]))
PROMPTS = Prompts(BATCH["prompt_ids"], BATCH["prompt_mask"], frozenset({1}), 0)
STUDENT, TEACHER = tiny_llama(3).eval(), tiny_llama(4).eval()


def written(k, *, prompts=PROMPTS, seeds=range(4), longest=10, **options):
    sampler = SpeculativeSampler(k, **options)
    models = [(STUDENT, 1.0), (TEACHER, 0.0)]
    given = SamplingOptions(max_new_tokens=longest)
    return sampler.generate(prompts, given, seeds=seeds, models=models)


@pytest.mark.parametrize("k", [18, 1000])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_with_the_whole_vocabulary_it_is_the_students_own_text_bit_for_bit(k, cache):
    ours = written(k, cache=cache)
    own = CachedSampler(cache).generate(
        PROMPTS, SamplingOptions(max_new_tokens=10), seeds=range(4), models=[(STUDENT, 1.0)]
    )
    for name in ("ids", "mask", "log_probs", "sampling_log_probs"):
        assert torch.equal(getattr(ours, name), getattr(own, name))


@pytest.mark.parametrize("seed", [0, 100])
def test_with_one_token_it_is_the_greedy_teacher_whatever_the_seed(seed):
    ours = written(1, seeds=range(seed, seed + 4))
    greedy = TEACHER.generate(
        input_ids=PROMPTS.ids, attention_mask=PROMPTS.mask, max_new_tokens=10, do_sample=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    assert torch.equal(ours.ids, greedy[:, PROMPTS.ids.shape[1] :])
    assert ours.sampling_log_probs.abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 5])
def test_tokens_come_as_from_drafts_that_the_teacher_replaces(k):
    """The two stages of the paper on NumPy's random numbers, and the probabilities in closed form."""
    rows = 20_000
    prompt = BATCH["prompt_ids"][:1, -2:]
    with torch.no_grad():
        q, p = (m(prompt).logits[0, -1].double().softmax(-1).numpy() for m in (STUDENT, TEACHER))
    accepted = np.argsort(-p)[:k]
    again = p[accepted] / p[accepted].sum()
    expected = np.zeros_like(q)
    expected[accepted] = q[accepted] + (1 - q[accepted].sum()) * again
    rng = np.random.default_rng(0)
    drafts = rng.choice(18, rows, p=q)
    replaced = np.where(np.isin(drafts, accepted), drafts, rng.choice(accepted, rows, p=again))
    many = Prompts(prompt.expand(rows, -1), torch.ones(rows, 2).long(), frozenset({1}), 0)
    ours = written(k, prompts=many, seeds=range(rows), longest=1)
    counts = np.bincount(ours.ids[:, 0].numpy(), minlength=18) / rows
    assert set(np.unique(ours.ids)) <= set(accepted)
    assert counts == pytest.approx(np.bincount(replaced, minlength=18) / rows, abs=0.015)
    assert counts == pytest.approx(expected, abs=0.012)
    drawn = ours.sampling_log_probs[:, 0].exp().numpy()
    assert drawn == pytest.approx(expected[ours.ids[:, 0]], rel=1e-4)
    assert ours.log_probs[:, 0].exp().numpy() == pytest.approx(q[ours.ids[:, 0]], rel=1e-4)


def test_a_completion_depends_on_its_prompt_and_seed_alone():
    together = written(3)
    for row in range(4):
        alone = Prompts(PROMPTS.ids[row : row + 1], PROMPTS.mask[row : row + 1], PROMPTS.eos_ids, 0)
        one = written(3, prompts=alone, seeds=[row])
        length = int(together.mask[row].sum())
        assert one.ids[0, :length].tolist() == together.ids[row, :length].tolist()


class Kept(GradientProbe):
    """The rollouts too."""

    def __init__(self):
        self.rollouts = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rollouts.append(dict(batch))


def fit(method=GKD, teacher=None, *, module=None, data=None, **options):
    probe = Kept()
    given = {"generation": SamplingOptions(max_new_tokens=6), "table_every": 0} | options
    built = method(
        student=StudentSpec.of(tiny_llama(0)),
        **({"teacher": teacher or LocalTeacher.of(tiny_llama(1))} if method is not SFT else {}),
        **(module or {}),
    )
    # The probe comes behind what changes batches.
    run = trainer(max_steps=1, max_epochs=-1, callbacks=[OnPolicyGeneration(**given), probe])
    run.fit(built, datamodule=Letters(batch_size=4))
    return probe


def test_rollouts_have_none_but_the_teachers_tokens_and_are_the_students_in_the_limit():
    ((batch,), teacher) = fit(engine=SpeculativeSampler(3)).rollouts, tiny_llama(1).eval()
    with torch.no_grad():
        best = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.topk(3)
    generated = batch["completion_mask"][:, 1:]
    among = (best.indices[:, :-1] == batch["input_ids"][:, 1:, None]).any(-1)
    assert generated.sum() > 8
    assert among[generated].all()
    whole, plain = fit(engine=SpeculativeSampler(18)), fit(engine=CachedSampler())
    assert torch.equal(whole.rollouts[0]["input_ids"], plain.rollouts[0]["input_ids"])
    assert torch.equal(whole.gradient, plain.gradient)


SKD = SpeculativeSampler(3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": OnPolicyDistillation}, "OnPolicyDistillation weighs tokens"),
        ({"method": SFT}, "SFT learns the completions of the data"),
        ({"mixture_alpha": 0.2}, "SpeculativeSampler cannot sample from a mixture"),
        ({"off_policy": "teacher", "lmbda": 0.5}, "set lmbda: 1 or off_policy: dataset"),
        (
            {"generation": SamplingOptions(max_new_tokens=6, top_p=0.9)},
            "its k alone decides what is left out",
        ),
        (
            {"teacher": Tells(tiny_llama(1), "top_k")},
            "GKD with engine: SpeculativeSampler needs a teacher that lists 'mixture'",
        ),
        ({"module": {"engine": SKD}}, "give it as on_policy.engine, and here an engine"),
    ],
)
def test_what_it_is_not_for_is_refused_before_the_first_step(given, said):
    with pytest.raises(ValueError, match=said):
        fit(**({"engine": SKD} | given))


def test_alone_it_does_not_generate_and_k_is_a_number_of_tokens():
    with pytest.raises(ValueError, match="k is 0; it must be a whole number"):
        SpeculativeSampler(0)
    with pytest.raises(ValueError, match="the student and its teacher together"):
        generate(
            STUDENT,
            letter_tokenizer(),
            PROMPTS.ids,
            PROMPTS.mask,
            SamplingOptions(max_new_tokens=4),
            seeds=range(4),
            engine=SKD,
        )
    with pytest.raises(ValueError, match="the student and its teacher together"):
        SupervisedKD(
            student=StudentSpec.of(tiny_llama(0)),
            teacher=LocalTeacher.of(tiny_llama(1)),
            generation=GenerationOptions(max_new_tokens=4),
            engine=SKD,
        )
